"""How much of a picture is decoded for an edit, and where its tokens are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from retouch.edit import Edit
from retouch.engine import Engine
from retouch.models import framing, transformer
from retouch.models.options import Options


@given(
    region=st.tuples(*[st.integers(0, 40)] * 4), halo=st.integers(0, 70), unit=st.sampled_from([8, 16]),
    size=st.tuples(*[st.integers(1, 6)] * 2),
)  # fmt: skip
def test_a_window_holds_the_region_and_its_halo(
    region: tuple[int, int, int, int], halo: int, unit: int, size: tuple[int, int]
) -> None:
    """Of what there is of them, and less than a unit more on each side."""
    first = [start % (length * unit) for start, length in zip(region[::2], size, strict=True)]
    last = [min(length * unit, start + 1 + more) for start, more, length in zip(first, region[1::2], size, strict=True)]
    found = framing.window((first[0], last[0], first[1], last[1]), halo, unit, size)
    for (low, high), start, stop, length in zip((found[:2], found[2:]), first, last, size, strict=True):
        assert low * unit <= max(0, start - halo) < (low + 1) * unit
        assert (high - 1) * unit < min(length * unit, stop + halo) <= high * unit


@pytest.mark.parametrize(
    ("halo", "decoded"),
    [(0, (40 // 8, 64 // 8)), (8, (56 // 8, 80 // 8)), (13, (72 // 8, 88 // 8)), (None, (16, 20))],
)
def test_only_the_masks_bounds_and_the_halo_are_decoded(halo: int | None, decoded: tuple[int, int]) -> None:
    model, seen = tiny.model("Flux2KleinKVPipeline", options=Options(halo=halo)), []

    def pixels(of: Tensor, decode: Any = model._pixels) -> np.ndarray:
        seen.append(tuple(of.shape[-2:]))
        return decode(of)

    model._pixels = pixels  # type: ignore[method-assign]
    photo, mask = tiny.photo(128, 160), np.zeros((128, 160), bool)
    mask[44:76, 50:106] = True  # latents 5 to 10 and 6 to 14, which the halo adds one to, or more
    (edited,) = Engine(model).edit([Edit(photo, "a red apple", mask)])
    assert seen == [decoded]
    assert (edited.image[~mask] == photo[~mask]).all()
    assert (edited.image[mask] != photo[mask]).any()


def test_rotary_angles_are_those_of_the_coordinates() -> None:
    model = tiny.model("Flux2KleinKVPipeline").transformer
    positions = torch.tensor([[0, 0, 0, 0], [10, 31, 7, 0], [0, -5, 63, 511]])
    rope = transformer.rope_of(model, positions)
    dims, theta = model.pos_embed.axes_dim, model.pos_embed.theta
    assert rope.shape == (3, 1, sum(dims) // 2)
    rates = [theta ** -(torch.arange(0, dim, 2).double() / dim) for dim in dims]
    angles = torch.cat([positions[:, axis, None] * rate for axis, rate in enumerate(rates)], -1)
    assert torch.allclose(torch.view_as_real(rope[:, 0]), torch.stack([angles.cos(), angles.sin()], -1).float(), atol=1e-7)


class OnMeta(TorchDispatchMode):
    """What was done on that device."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.done += [str(func.overloadpacket)] * (made.device.type == "meta")
        return made


def test_rotary_tables_come_to_their_device_whole() -> None:
    """As copies, which are waited for: threads with streams of their own share them."""
    with OnMeta() as seen:
        tables = transformer._turns.__wrapped__(2000.0, (4, 8), torch.device("meta"))
    assert [tuple(table.shape) for table in tables] == [(2 * transformer.REACH, 2), (2 * transformer.REACH, 4)]
    assert seen.done == ["aten._to_copy"] * 2
