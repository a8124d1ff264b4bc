"""Documents in 8 bits: how far off, how many bytes, and that it is said."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny
from retouch.edit import Edit, InvalidOption
from retouch.engine.engine import Engine
from retouch.models import codec
from retouch.models.compact import FORMS, Compact, compact, dense
from retouch.models.options import Options

KV = "Flux2KleinKVPipeline"


@pytest.mark.parametrize(("form", "error"), [("int8", 0.5 / 127), ("fp8", 1 / 16)])
def test_each_row_is_within_its_step(form: str, error: float) -> None:
    x = torch.randn(50, 3, 64) * torch.logspace(-3, 3, 50)[:, None, None]
    kept = compact(x, form)
    assert kept.nbytes < 0.27 * x.nbytes
    assert ((kept.dense(torch.float32) - x).abs() <= 1.02 * error * x.abs().amax(-1, keepdim=True)).all()


def test_zeros_and_plain_tensors_stay() -> None:
    assert (compact(torch.zeros(4, 2, 8), "int8").dense(torch.float32) == 0).all()
    x = torch.randn(3, 2, 8)
    assert dense(x, torch.float32) is x


@pytest.mark.parametrize("form", sorted(FORMS))
def test_an_edit_hardly_changes_and_says_so(form: str) -> None:
    mask = np.zeros((96, 128), bool)
    mask[20:70, 30:90] = True
    edit = Edit(tiny.photo(96, 128), "a red apple", mask, seed=3)
    exact = Engine(tiny.model(KV)).edit([edit])[0]
    engine = Engine(tiny.model(KV, options=Options(halo=None, feather=0, keys=form)))
    first, second = engine.edit([edit, Edit(edit.image, "a red apple", mask, seed=3, reuse=False)])
    assert first.usage.approximate == (f"{form} documents",)
    assert exact.usage.approximate == ()
    assert (first.image == second.image).all()
    difference = np.abs(first.image.astype(int) - exact.image)
    assert 0 < difference.max() < 40
    assert difference[mask].mean() < 4
    assert (first.image[~mask] == edit.image[~mask]).all()


def test_its_document_has_another_key_and_survives_the_disk() -> None:
    plain, lossy = tiny.model(KV), tiny.model(KV, options=Options(keys="int8"))
    edit = Edit(tiny.photo(64, 64), "a red apple")
    frame = lossy.frame(edit)
    assert frame.key != plain.frame(edit).key
    document = lossy.encode_document(frame)
    assert document.bytes < 0.5 * plain.encode_document(plain.frame(edit)).bytes
    again = codec.load_document(codec.dump_document(document), torch.device("cpu"))
    assert again.bytes == document.bytes
    for pair, kept in zip(again.keys, document.keys, strict=True):
        for one, other in zip(pair, kept, strict=True):
            assert isinstance(one, Compact)
            assert isinstance(other, Compact)
            assert torch.equal(one.values, other.values)
            assert torch.equal(one.scale, other.scale)


def test_unknown_forms_are_refused() -> None:
    with pytest.raises(InvalidOption, match="int4"):
        Options(keys="int4")
