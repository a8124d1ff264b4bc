"""What tells the weights of one checkpoint from those of another, beside which a cache on disk may be used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from retouch.engine import build
from retouch.engine.build import BLOCK, BLOCKS, HEAD, _fingerprint

TIME = 1_600_000_000


def write(folder: Path, name: str, content: bytes) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    os.utime(folder / name, (TIME, TIME))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "model_index.json", b'{"steps": 4}')
    write(tmp_path, "vae/weights.safetensors", bytes(1000))
    write(tmp_path, "transformer/weights.safetensors", bytes(40 << 20))
    return tmp_path


def changed(folder: Path, name: str, at: int, count: int = 1) -> None:
    content = bytearray((folder / name).read_bytes())
    content[at : at + count] = b"\1" * count
    write(folder, name, bytes(content))


@pytest.mark.parametrize(
    ("name", "at", "count"),
    [
        ("model_index.json", 10, 1), ("vae/weights.safetensors", 500, 1), ("transformer/weights.safetensors", 0, 1),
        ("transformer/weights.safetensors", HEAD - 1, 1), ("transformer/weights.safetensors", (40 << 20) - 1, 1),
        ("transformer/weights.safetensors", 17_654_321, (40 << 20) // 1000),
    ],
)  # fmt: skip
def test_weights_of_one_size_and_time_are_told_apart(folder: Path, name: str, at: int, count: int) -> None:
    before = _fingerprint(folder, folder)
    assert _fingerprint(folder, folder) == before
    changed(folder, name, at, count)
    assert _fingerprint(folder, folder) != before


@pytest.mark.parametrize("size", [HEAD, HEAD + 1, HEAD + BLOCK + 1, HEAD + 3 * BLOCK - 1, HEAD + BLOCKS * BLOCK])
def test_a_file_up_to_five_mebibytes_is_read_whole(tmp_path: Path, size: int) -> None:
    write(tmp_path, "a.safetensors", bytes(size))
    before = _fingerprint(tmp_path, tmp_path)
    for at in {0, HEAD - 1, size // 2, max(0, size - BLOCK - 1), size - 1}:
        write(tmp_path, "a.safetensors", bytes(size))
        changed(tmp_path, "a.safetensors", at)
        assert _fingerprint(tmp_path, tmp_path) != before, at


def test_names_and_times_tell_too(folder: Path) -> None:
    before = _fingerprint(folder, folder)
    os.utime(folder / "vae/weights.safetensors", (TIME, TIME + 1))
    later = _fingerprint(folder, folder)
    (folder / "vae/weights.safetensors").rename(folder / "vae/other.safetensors")
    assert len({before, later, _fingerprint(folder, folder)}) == 3


def test_of_a_large_file_five_mebibytes_are_read(tmp_path: Path) -> None:
    class Counting:
        read = 0

        def update(self, content: bytes) -> None:
            self.read += len(content)

    path, counting = tmp_path / "a.safetensors", Counting()
    with path.open("wb") as file:
        file.truncate(4 << 30)  # of which the disk keeps nothing
    build._sample(path, 4 << 30, counting)  # type: ignore[arg-type]
    assert counting.read == HEAD + BLOCKS * BLOCK == 5 << 20
