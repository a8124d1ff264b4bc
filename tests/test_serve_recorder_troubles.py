"""A recorder on bad days: it is killed, behind, or without room, and costs no edit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from recordings import made_by, recorded, serving, until
from retouch import picture, trace
from retouch.edit import InvalidOption, OutputFailed
from retouch.engine.worker import Options
from retouch.measure.pictures import Pictures
from retouch.picture import Picture
from retouch.serve import main, recorder
from retouch.serve.recorder import Recorder
from retouch.serve.settings import Recording
from retouch.trace import InvalidTrace, Result, View, hash_of
from serving import PATIENCE, Painter, alpha_mask, area, decoded, encoded, form, photo

MASK = area()
IMAGE, HOLE = encoded(photo()), alpha_mask(MASK)
JOBS = "/v1/jobs"


def test_a_process_that_is_killed_leaves_a_trace_that_reads(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    script = Path(__file__).parent / "serving.py"
    with subprocess.Popen([sys.executable, script, "0", "20", path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        for seed in range(3):
            assert httpx.post(f"{url}/v1/images/edits", timeout=PATIENCE, **form(IMAGE, HOLE, seed=seed)).status_code == 200
        until(lambda: path.read_bytes().count(b"\n") == 4)
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE)
    assert [request.seed for request in recorded(path)] == [0, 1, 2]
    whole = path.read_bytes()
    for cut in (1, 5, 40):
        path.write_bytes(whole[:-cut])
        assert len(recorded(path)) == (3 if cut == 1 else 2)
    path.write_bytes(whole[:20])
    with pytest.raises(InvalidTrace, match="cut off"):
        trace.read(path)


def test_a_recorder_that_is_behind_drops_and_never_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that stands still holds so many bytes and no more."""
    import threading

    stand = threading.Event()
    known = Recorder._asked
    monkeypatch.setattr(recorder, "HELD", 5 * (len(IMAGE) + 700))
    monkeypatch.setattr(Recorder, "_asked", lambda self, item: (stand.wait(PATIENCE), known(self, item)))
    path = tmp_path / "t.jsonl"
    with serving(Recording(path)) as server:
        for seed in range(12):
            assert server.edit(IMAGE, HOLE, seed=seed).status_code == 200
        counts = server.service.recorder.counts
        assert server.service.recorder._held <= recorder.HELD
        assert 5 <= counts["dropped"] < 12
        assert counts["forgotten"] > 0
        stand.set()
        until(lambda: counts["written"] + counts["dropped"] == 12)
        until(lambda: not server.service.recorder._held)
        assert server.edit(IMAGE, HOLE, seed=99).status_code == 200
    assert [request.seed for request in recorded(path)][-1] == 99


def test_what_is_remembered_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "KNOWN", 2)
    path = tmp_path / "t.jsonl"
    with serving(Recording(path)) as server:
        made = [made_by(server.edit(encoded(photo(seed=i)), HOLE, seed=i))[0] for i in range(4)]
        for one in (made[0], made[3]):
            assert server.edit(one, HOLE).status_code == 200
        until(lambda: server.service.recorder.counts["written"] == 6)
        assert len(server.service.recorder._results) == len(server.service.recorder._sessions) == 2
    assert [type(request.document) for request in recorded(path)][4:] == [View, Result]


def test_a_disk_that_is_full_costs_rows_and_no_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """Takes half of a line."""

        def __init__(self, file: Any) -> None:
            self.file, self.full = file, True

        def write(self, row: bytes) -> int:
            return int(self.file.write(row[: len(row) // 2] if self.full else row))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    path = tmp_path / "t.jsonl"
    with serving(Recording(path)) as server:
        own = server.service.recorder
        own._file = full = Full(own._file)
        assert server.edit(IMAGE, HOLE, seed=1).status_code == 200
        until(lambda: own.counts["dropped"] == 1)
        full.full = False
        assert server.edit(IMAGE, HOLE, seed=2).status_code == 200
    assert [request.seed for request in recorded(path)] == [2]


def test_a_folder_that_cannot_be_written_costs_the_pictures_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, folder = tmp_path / "t.jsonl", tmp_path / "p"
    with serving(Recording(path, True, folder)) as server:
        folder.rmdir()
        folder.write_text("a file now")
        for _ in range(3):
            assert server.edit(IMAGE, HOLE).status_code == 200
    assert {request.document for request in recorded(path)} == {View(hash_of(IMAGE), (64, 48))}
    assert caplog.text.count("cannot be written") == 1


@pytest.mark.parametrize(
    ("recording", "error", "says"),
    [
        (Recording(Path("{}/there")), InvalidOption, "exists already"),
        (Recording(Path("{}/no/t.jsonl")), OutputFailed, "could not be written"),
        (Recording(Path("{}/t.jsonl"), pictures=Path("{}/there/p")), OutputFailed, "could not be written"),
        (Recording(Path("{}/t.jsonl"), pictures=Path("{}/there")), InvalidOption, "exists already"),
    ],
)
def test_where_it_cannot_record_it_says_so(tmp_path: Path, recording: Recording, error: type[Exception], says: str) -> None:
    (tmp_path / "there").write_text("a file")
    folder = recording.pictures
    with pytest.raises(error, match=says):
        Recorder(
            Recording(
                Path(str(recording.file).format(tmp_path)),
                pictures=None if folder is None else Path(str(folder).format(tmp_path)),
            )
        )


@pytest.mark.parametrize("options", [["--record-prompts"], ["--record-pictures", "p"], ["--record", __file__]])
def test_options_that_record_nothing_are_refused(options: list[str]) -> None:
    with pytest.raises(InvalidOption, match="--record"):
        main([*options, "--port", "0"])


def test_cancelled_edits_are_in_it_too(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with serving(Recording(path), Painter(Options(queue=2), hold=True)) as server:
        job = server.edit(IMAGE, HOLE, path=JOBS, n=2).json()["id"]
        assert server.edit(IMAGE, HOLE).status_code == 429  # which is not: it was not taken on
        server.client.delete(f"/v1/jobs/{job}")
        server.idle()
    (request,) = recorded(path)
    assert request.n == 2


def test_pictures_read_back_what_the_server_read(tmp_path: Path) -> None:
    """Every format that the server takes."""
    folder = tmp_path / "p"
    kinds = {"PNG": {}, "JPEG": {}, "WEBP": {}, "GIF": {}, "BMP": {}, "TIFF": {}, "PPM": {}}
    files = [encoded(photo(seed=i), kind, **more) for i, (kind, more) in enumerate(kinds.items())]
    with serving(Recording(tmp_path / "t.jsonl", True, folder)) as server:
        for file in files:
            assert server.edit(file).status_code == 200
    pictures = Pictures(folder)
    views = trace.read(tmp_path / "t.jsonl").roots()
    assert len(views) == len(files)
    for file, view in zip(files, views, strict=True):
        assert isinstance(picture.read(file), Picture)
        assert (pictures.pixels(view) == picture.read(file).pixels).all()
    assert json.loads((tmp_path / "t.jsonl").read_text().splitlines()[0])["mix"] == "recorded"
    assert decoded(files[0]).shape == (48, 64, 3)
