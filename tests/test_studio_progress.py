"""The studio while an edit is on its way, in a real browser. Skipped where that of `test_studio` is."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from serving import Painter, Serving, encoded, photo
from test_studio import Studio, browser, sync_api, visit  # noqa: F401 (a fixture)

SIDES = 2000, 1500
BOX = 1500, 1000, 240, 200
"""Of the mask: left, top, width, height."""

BOUNDS = """([id, blue]) => {
  const canvas = document.getElementById(id);
  const { width, height } = canvas;
  const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
  let [x0, x1, y0, y1] = [width, -1, height, -1];
  for (let i = 0; i < width * height; i++) {
    if (data[4 * i + 3] === 0 || (blue && (data[4 * i + 2] < 180 || data[4 * i] > 60))) continue;
    const [x, y] = [i % width, Math.floor(i / width)];
    [x0, x1, y0, y1] = [Math.min(x0, x), Math.max(x1, x), Math.min(y0, y), Math.max(y1, y)];
  }
  return [x0, y0, x1 + 1, y1 + 1];
}"""
"""Where there is something on a canvas, or where it is blue."""

EVENTS = """() => {
  const { fetch } = window;
  window.connections = 0;
  window.fetch = async (url, options) => {
    if (!String(url).endsWith("/events")) return fetch(url, options);
    window.connections++;
    const body = new ReadableStream({
      start(stream) {
        window.tell = (event) => stream.enqueue(new TextEncoder().encode(`data: ${JSON.stringify(event)}\\n\\n`));
        window.cut = () => stream.error(new TypeError("the connection broke"));
        options.signal.addEventListener("abort", () => stream.error(options.signal.reason));
      },
    });
    return new Response(body);
  };
}"""
"""A job's events are what `tell` says, until `cut` breaks the connection."""


@pytest.fixture
def held() -> Iterator[Serving]:
    with Serving(worker=Painter(hold=True)) as server:
        yield server


@pytest.fixture
def studio(browser: sync_api.Browser, held: Serving) -> Iterator[Studio]:  # noqa: F811
    with visit(browser, held.url) as studio:
        yield studio


def asked(studio: Studio, folder: Path, sides: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    """A gray photo is open, with a mask, a prompt and a seed, whose colour is the painter's."""
    Image.new("RGB", sides, (128, 128, 128)).save(folder / "photo.png")
    studio.open(folder / "photo.png")
    studio.box(*box)
    studio.page.fill("#prompt", "a star")
    studio.page.fill("#seed", "5")


def bounds(studio: Studio, canvas: str, blue: bool = False) -> list[float]:
    studio.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return list(studio.page.evaluate(BOUNDS, [canvas, blue]))


def test_a_preview_of_a_large_photo_lies_where_the_photo_does(studio: Studio, held: Serving, tmp_path: Path) -> None:
    """It is smaller than the photo, and the mask's rim, the zoom and the thumbnail are the photo's."""
    page = studio.page
    asked(studio, tmp_path, SIDES, BOX)
    page.focus("#above")
    for _ in range(2):
        page.keyboard.press("-")
    left, _, right, _ = bounds(studio, "below")
    page.click("#run")
    page.wait_for_selector(".tile.pending.previewed")
    photo_at = bounds(studio, "below")
    assert photo_at[2] - photo_at[0] == right - left
    scale = (right - left) / SIDES[0]
    mask_at = [photo_at[0] + BOX[0] * scale, photo_at[1] + BOX[1] * scale]
    mask_at += [mask_at[0] + BOX[2] * scale, mask_at[1] + BOX[3] * scale]
    page.locator(".tile").first.click()
    assert bounds(studio, "below") == photo_at
    assert bounds(studio, "above") == pytest.approx(mask_at, abs=4)
    assert bounds(studio, "below", blue=True) == pytest.approx(mask_at, abs=4)
    thumb = page.evaluate(
        """() => {
            const canvas = document.querySelector(".tile canvas");
            return [...canvas.getContext("2d").getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data];
        }"""
    )
    assert (thumb[0], thumb[2]) == pytest.approx((5, 200), abs=6), "what is edited is in its middle"

    held.worker.release()
    studio.finished(1)
    left, _, right, _ = bounds(studio, "below")
    assert right - left == photo_at[2] - photo_at[0]


def connected(studio: Studio, times: int) -> None:
    """Wait until the page has asked for the events so often."""
    for _ in range(200):
        if studio.page.evaluate("window.connections") == times:
            return
        studio.page.wait_for_timeout(50)
    raise AssertionError


def test_variations_are_counted_as_they_come(studio: Studio, tmp_path: Path) -> None:
    """In whatever order, and once, though a connection that broke is told everything again."""
    page = studio.page
    page.evaluate(EVENTS)
    asked(studio, tmp_path, (96, 64), (16, 16, 32, 32))
    studio.choose("n", "4")
    page.click("#run")
    connected(studio, 1)
    picture = base64.b64encode(encoded(photo(96, 64))).decode()
    told: list[dict[str, Any]] = []

    def tell(event: dict[str, Any]) -> None:
        told.append(event)
        page.evaluate("(event) => window.tell(event)", event)

    def completed(index: int) -> dict[str, Any]:
        usage = {"retouch": {"seconds": {}}}
        more = {"b64_json": picture, "output_format": "png", "seed": 5 + index, "usage": usage}
        return {"type": "image_edit.completed", "index": index, **more}

    progress = page.locator("#progress-text")
    tell({"type": "job.status", "status": "running", "done": 0})
    sync_api.expect(progress).to_contain_text("0 of 4 done")
    tell(completed(3))
    sync_api.expect(progress).to_contain_text("1 of 4 done")
    tell(completed(1))
    sync_api.expect(progress).to_contain_text("2 of 4 done")
    page.evaluate("window.cut()")
    connected(studio, 2)
    for event in list(told):
        page.evaluate("(event) => window.tell(event)", event)
    page.wait_for_timeout(200)
    sync_api.expect(progress).to_contain_text("2 of 4 done")
    for index in (0, 2):
        tell(completed(index))
    tell({"type": "job.status", "status": "succeeded", "done": 4})
    studio.finished(4)


def test_who_leaves_while_the_job_is_sent_leaves_no_job(studio: Studio, held: Serving, tmp_path: Path) -> None:
    page = studio.page
    asked(studio, tmp_path, (96, 64), (16, 16, 32, 32))
    waiting: list[sync_api.Route] = []
    page.route("**/v1/jobs", lambda route: waiting.append(route))
    page.click("#run")
    sync_api.expect(page.locator("#status")).to_have_text("Sending…")
    page.wait_for_timeout(200)
    assert len(waiting) == 1
    page.evaluate("window.dispatchEvent(new PageTransitionEvent('pagehide'))")
    with page.expect_response(lambda answer: answer.request.method == "DELETE") as ended:
        waiting[0].continue_()
    job = ended.value.json()
    assert (job["prompt"], job["status"]) == ("a star", "cancelled")
    studio.finished(0)
    held.worker.wait(lambda: len(held.worker.cancelled) == len(held.worker.asked))


def test_a_page_that_is_closed_cancels_its_job(browser: sync_api.Browser, held: Serving, tmp_path: Path) -> None:  # noqa: F811
    studio = Studio(browser, held.url)
    asked(studio, tmp_path, (96, 64), (16, 16, 32, 32))
    studio.page.click("#run")
    held.worker.wait(lambda: len(held.worker.asked) == 1)
    sync_api.expect(studio.page.locator("#status")).to_contain_text("Running")
    studio.page.close(run_before_unload=True)
    held.worker.wait(lambda: len(held.worker.cancelled) == 1)
    studio.context.close()
    (job,) = held.get("/v1/jobs").json()["data"]
    assert job["status"] == "cancelled"
