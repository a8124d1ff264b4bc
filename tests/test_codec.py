"""What is encoded comes back from disk as it was, and an edit from it is the same edit."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from retouch.cache.disk import Disk
from retouch.cache.memory import Memory
from retouch.cache.store import Store
from retouch.edit import Edit
from retouch.engine.engine import Engine
from retouch.models import codec

CPU = torch.device("cpu")


def edit() -> Edit:
    mask = np.zeros((64, 80), bool)
    mask[16:40, 20:50] = True
    return Edit(tiny.photo(64, 80), "a cat", mask, references=(tiny.photo(48, 48, 1),), seed=3, steps=2)


@pytest.mark.parametrize("name", ["Flux2KleinKVPipeline", "Flux2KleinPipeline"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_document_comes_back_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    model = tiny.model(name)
    document = model.encode_document(model.frame(edit()))
    keys = tuple((k.to(dtype), v.to(dtype)) for k, v in document.keys)
    document = type(document)(document.key, document.tokens, keys, document.reference, document.positions)
    again = codec.load_document(codec.dump_document(document), CPU)
    assert again.key == document.key
    assert again.bytes == document.bytes
    for one, other in ((again.tokens, document.tokens), (again.reference, document.reference)):
        assert torch.equal(one, other)
    assert torch.equal(again.positions, document.positions)
    assert len(again.keys) == len(document.keys)
    for pair, kept in zip(again.keys, document.keys, strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(pair, kept, strict=True))


def engine(folder: Path) -> Engine:
    documents = Disk(folder / "documents", 1 << 30, codec.dump_document, partial(codec.load_document, device=CPU))
    prompts = Disk(folder / "prompts", 1 << 30, codec.dump_prompt, partial(codec.load_prompt, device=CPU))
    room = 1 << 30
    return Engine(
        tiny.model("Flux2KleinKVPipeline"),
        documents=Store(Memory("device", room), documents),
        prompts=Store(Memory("device", room), prompts),
    )


def test_the_next_engine_finds_what_the_last_one_encoded(tmp_path: Path) -> None:
    first = engine(tmp_path)
    (cold,) = first.edit([edit()])
    first.close()
    (warm,) = engine(tmp_path).edit([edit()])
    assert cold.usage.cache_hits == ()
    assert set(warm.usage.cache_hits) == {"document", "prompt"}
    assert np.array_equal(warm.image, cold.image)


def test_a_damaged_document_is_encoded_anew(tmp_path: Path) -> None:
    first = engine(tmp_path)
    (cold,) = first.edit([edit()])
    first.close()
    (file,) = (tmp_path / "documents").glob("*.cache")
    file.write_bytes(file.read_bytes()[:-100])
    (again,) = engine(tmp_path).edit([edit()])
    assert again.usage.cache_hits == ("prompt",)
    assert np.array_equal(again.image, cold.image)
