"""Uploads whose file was damaged while no server ran: they are written anew when they are sent again."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from retouch.engine.worker import Options
from serving import Painter, Serving, alpha_mask, area, encoded, photo

IMAGE, HOLE = encoded(photo()), alpha_mask(area())


def upload(folder: Path) -> tuple[str, Path]:
    with Serving(worker=Painter(Options(cache=folder))) as server:
        document = server.post("/v1/documents", files={"file": IMAGE}).json()["id"]
    (file,) = (folder / "uploads").glob("*.cache")
    return document, file


def test_an_upload_over_a_damaged_file_is_kept(tmp_path: Path) -> None:
    document, file = upload(tmp_path)
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with Serving(worker=Painter(Options(cache=tmp_path))) as server:
        again = server.post("/v1/documents", files={"file": IMAGE})
        assert (again.status_code, again.json()["id"]) == (201, document)
        assert server.get(f"/v1/documents/{document}").status_code == 200
        assert server.edit([], HOLE, document=document).status_code == 200
    with Serving(worker=Painter(Options(cache=tmp_path))) as server:
        assert server.get(f"/v1/documents/{document}").status_code == 200


def test_an_upload_over_a_file_that_cannot_be_read_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document, file = upload(tmp_path)
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path == file:
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    with Serving(worker=Painter(Options(cache=tmp_path))) as server:
        monkeypatch.setattr(Path, "read_bytes", refuse)
        written = file.stat().st_mtime_ns
        assert server.get(f"/v1/documents/{document}").status_code == 404
        assert server.post("/v1/documents", files={"file": IMAGE}).status_code == 201
        assert file.stat().st_mtime_ns > written
        monkeypatch.undo()
        assert server.get(f"/v1/documents/{document}").status_code == 200


def test_an_upload_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    document, file = upload(tmp_path)
    with Serving(worker=Painter(Options(cache=tmp_path))) as server:
        before = file.stat()
        assert server.post("/v1/documents", files={"file": IMAGE}).json()["id"] == document
        assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
