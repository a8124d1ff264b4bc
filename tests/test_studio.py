"""The studio page in a real browser against the real server. Skipped where there is no Chromium or no playwright.

RETOUCH_STUDIO_URL names a server that already runs; otherwise one is started.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retouch.edit import MAX_STEPS

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("the studio's tests want Chromium (CHROMIUM names one that is not on PATH)", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="the studio's tests want playwright (pip install playwright)")

QUIET = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync --no-first-run"
PHOTO = Path(__file__).parents[1] / "photos" / "coffee.jpg"
PATIENCE_MS = 30_000


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    """Where the server answers. One thread: where the machine is busy, a second one waits at every barrier."""
    if url := os.environ.get("RETOUCH_STUDIO_URL"):
        yield url.rstrip("/")
        return
    command = [sys.executable, "-m", "retouch.cli", "serve", "--port", "0", "--host", "127.0.0.1"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as server:
        try:
            lines = iter(server.stdout.readline, "")
            found = next((match[1] for line in lines if (match := re.search(r"Retouch serves (http://\S+)", line))), None)
            assert found, "the server ended before it said where it serves"
            yield found
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(20)
            server.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield browser
        browser.close()


class Studio:
    """One visit of the page, and what it did that no visit should: console errors, requests to elsewhere."""

    def __init__(self, browser: sync_api.Browser, base: str, **context):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.wrong: list[str] = []
        self.page.on("console", lambda message: message.type == "error" and self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: request.url.startswith((base, "blob:")) or self.wrong.append(request.url))
        self.page.on("filechooser", lambda chooser: chooser.set_files(PHOTO))
        self.page.goto(base)

    def open(self, path: Path = PHOTO) -> None:
        self.page.set_input_files("#file", path)
        self.page.wait_for_selector(".edit.loaded")

    def choose(self, name: str, value: str) -> None:
        self.page.check(f"[name={name}][value='{value}']", force=True)

    def box(self, x: int, y: int, width: int, height: int) -> None:
        """A rectangle of the mask, by its numbers."""
        self.choose("tool", "rectangle")
        for field, value in {"x": x, "y": y, "width": width, "height": height}.items():
            self.page.fill(f"#rect-{field}", str(value))
        self.page.click("#rect-add")

    def place(self) -> tuple[float, float, float]:
        """Left, top and scale of the photo on the page, read off the canvas."""
        left, top, width = self.page.evaluate(
            """() => {
                const canvas = document.getElementById("below");
                const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                const box = canvas.getBoundingClientRect();
                let [x0, x1, y0] = [canvas.width, 0, canvas.height];
                for (let i = 3; i < data.length; i += 4) {
                    if (data[i] === 0) continue;
                    const [x, y] = [((i - 3) / 4) % canvas.width, Math.floor(i / 4 / canvas.width)];
                    [x0, x1, y0] = [Math.min(x0, x), Math.max(x1, x), Math.min(y0, y)];
                }
                return [box.left + x0, box.top + y0, x1 - x0 + 1];
            }"""
        )
        return left, top, width / Image.open(PHOTO).width

    def finished(self, results: int) -> None:
        self.page.wait_for_selector("#run:not([hidden])")
        sync_api.expect(self.page.locator(".tile:not(.pending)")).to_have_count(results, timeout=PATIENCE_MS)

    def downloaded(self, press: str | None = None) -> np.ndarray:
        with self.page.expect_download() as download:
            self.page.keyboard.press(press) if press else self.page.click("#download")
        return pixels(Path(download.value.path()).read_bytes())


@contextlib.contextmanager
def visit(browser, base: str) -> Iterator[Studio]:
    """The page, and that nothing went wrong on it."""
    studio = Studio(browser, base)
    yield studio
    studio.context.close()
    assert studio.wrong == []


@pytest.fixture
def studio(browser, base) -> Iterator[Studio]:
    with visit(browser, base) as studio:
        yield studio


def pixels(data: bytes | Path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data) if isinstance(data, bytes) else data).convert("RGB"))


SEEN = """selector => {
  window.seen = false;
  const look = () => { window.seen ||= document.querySelector(selector) !== null; };
  new MutationObserver(look).observe(document.body, { subtree: true, childList: true, attributeFilter: ["class"] });
}"""
"""Notes whether what a selector is for was there at any moment, be it for less time than a poll takes."""


def test_painting_with_the_mouse_changes_what_was_painted_and_no_other_pixel(studio):
    page = studio.page
    studio.open()
    left, top, scale = studio.place()
    path = [(200 + 8 * i, 150 + 5 * i) for i in range(8)]
    page.mouse.move(left + path[0][0] * scale, top + path[0][1] * scale)
    page.mouse.down()
    for x, y in path[1:]:
        page.mouse.move(left + x * scale, top + y * scale)
    page.mouse.up()
    page.keyboard.press("z")
    sync_api.expect(page.locator("#facts")).to_contain_text("no mask yet")
    page.keyboard.press("Shift+z")
    sync_api.expect(page.locator("#facts")).to_contain_text(re.compile(r"mask \d"))

    page.fill("#prompt", "a red apple")
    studio.choose("n", "2")
    page.fill("#seed", "7")
    page.click("#advanced summary")
    page.fill("#steps", "24")
    page.evaluate(SEEN, ".tile.pending.previewed")
    page.click("#run")
    studio.finished(2)
    assert page.evaluate("window.seen"), "a preview was shown before the result"
    sync_api.expect(page.locator("#account")).to_contain_text("Tokens computed")
    assert page.locator(".tile").nth(1).inner_text().split("\n")[1] == "seed 8"

    before, after = pixels(PHOTO), studio.downloaded()
    radius = int(page.locator("#size-text").inner_text().split()[0]) / 2
    y, x = np.mgrid[: before.shape[0], : before.shape[1]] + 0.5
    steps = np.linspace(0, 1, 200)
    line = [(path[0][0] + t * (path[-1][0] - path[0][0]), path[0][1] + t * (path[-1][1] - path[0][1])) for t in steps]
    near = np.min([np.hypot(x - px, y - py) for px, py in line], axis=0) < radius + 2
    changed = (before != after).any(-1)
    assert not changed[~near].any()
    assert changed[near].mean() > 0.3

    page.click("#continue")
    sync_api.expect(page.locator("#facts")).to_contain_text("no mask yet")
    page.locator(".tile").first.click()
    page.keyboard.press("Delete")
    sync_api.expect(page.locator(".tile")).to_have_count(1)
    page.click(".notice .small")
    sync_api.expect(page.locator(".tile")).to_have_count(2)


def test_an_edit_without_a_mouse(studio):
    page = studio.page
    page.keyboard.press("o")
    page.wait_for_selector(".edit.loaded")
    page.keyboard.press("r")
    focus(page, "above")
    for key in ["ArrowLeft", "ArrowLeft", "ArrowDown", "Shift+ArrowRight", "Shift+ArrowUp"]:
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#status")).to_contain_text("Mask")
    page.keyboard.press("p")
    page.keyboard.type("a red apple")
    page.keyboard.press("Control+Enter")
    studio.finished(1)

    focus(page, "divider")
    at = int(page.get_attribute("#divider", "aria-valuenow"))
    page.keyboard.press("ArrowRight")
    assert int(page.get_attribute("#divider", "aria-valuenow")) > at
    focus(page, "download")
    before, after = pixels(PHOTO), studio.downloaded("Enter")
    x, y, width, height = (int(page.input_value(f"#rect-{field}")) for field in ("x", "y", "width", "height"))
    inside = np.zeros(before.shape[:2], bool)
    inside[y : y + height, x : x + width] = True
    changed = (before != after).any(-1)
    assert not changed[~inside].any()
    assert changed[inside].any()


def sent(page: sync_api.Page, method: str) -> list[str]:
    """The paths of the requests from now on."""
    paths: list[str] = []
    page.on("request", lambda request: request.method == method and paths.append(request.url.partition("/v1/")[2]))
    return paths


def focus(page: sync_api.Page, element: str) -> None:
    """Reach an element as the keyboard does."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == element:
            return
    raise AssertionError(f"Tab does not reach #{element}")


def test_escape_cancels_the_job_and_keeps_prompt_and_mask(studio, base):
    page = studio.page
    studio.open()
    studio.box(20, 20, 300, 200)
    page.fill("#prompt", "a panda")
    studio.choose("n", "4")
    page.click("#advanced summary")
    assert page.get_attribute("#steps", "max") == str(MAX_STEPS)
    page.fill("#steps", str(MAX_STEPS))
    page.keyboard.press("Control+Enter")
    sync_api.expect(page.locator("#status")).to_contain_text("Running", timeout=PATIENCE_MS)
    asked = sent(page, "DELETE")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    studio.finished(0)
    sync_api.expect(page.locator("#notices")).to_contain_text("Cancelled")
    job = next(job for job in page.request.get(f"{base}/v1/jobs").json()["data"] if job["prompt"] == "a panda")
    assert job["status"] == "cancelled"
    assert asked == [f"jobs/{job['id']}"]
    assert page.input_value("#prompt") == "a panda"
    sync_api.expect(page.locator("#facts")).to_contain_text("mask 35 %")


def test_a_refusal_is_shown_and_nothing_is_lost(studio):
    page = studio.page
    studio.open()
    studio.box(200, 100, 80, 80)
    page.fill("#prompt", "a star")
    error = {"message": "Too many edits wait.", "type": "rate_limit_error", "param": None, "code": "queue_full"}
    page.route("**/v1/jobs", lambda route: route.fulfill(status=429, json={"error": error}, headers={"Retry-After": "7"}))
    page.click("#run")
    notice = page.get_by_role("alert").filter(has_text="Too many edits wait.")
    sync_api.expect(notice).to_contain_text("try again in 7 s")
    assert page.input_value("#prompt") == "a star"
    sync_api.expect(page.locator("#facts")).to_contain_text("mask 3.7 %")
    assert [text for text in studio.wrong if "429" not in text] == []
    studio.wrong.clear()

    page.unroute("**/v1/jobs")
    notice.get_by_role("button", name="Run again").click()
    studio.finished(1)


@pytest.fixture
def small(studio, tmp_path) -> Studio:
    """A small photo is open, with a mask and a prompt."""
    Image.new("RGB", (96, 64), (90, 120, 150)).save(tmp_path / "small.png")
    studio.open(tmp_path / "small.png")
    studio.box(16, 16, 32, 32)
    studio.page.fill("#prompt", "a heart")
    return studio


def test_one_run_at_a_time_from_the_press_to_the_last_picture(small):
    page = small.page
    posted = sent(page, "POST")
    page.evaluate(
        """() => {
            const { prototype } = HTMLCanvasElement;
            const { toBlob } = prototype;
            prototype.toBlob = function (...more) { setTimeout(() => toBlob.apply(this, more), 300); };
            window.freed = 0;
            const { close } = ImageBitmap.prototype;
            ImageBitmap.prototype.close = function () { window.freed++; close.call(this); };
            window.urls = new Set();
            const { createObjectURL, revokeObjectURL } = URL;
            URL.createObjectURL = (blob) => { const url = createObjectURL(blob); window.urls.add(url); return url; };
            URL.revokeObjectURL = (url) => { window.urls.delete(url); revokeObjectURL(url); };
        }"""
    )
    page.evaluate(SEEN, ".tile.pending.previewed")
    page.dblclick("#run")
    small.finished(1)
    assert posted == ["jobs"]
    assert page.evaluate("window.freed >= window.seen"), "the preview is closed"

    page.evaluate(
        """() => {
            const { createImageBitmap } = window;
            window.createImageBitmap = async (...more) => {
                await new Promise((done) => setTimeout(done, 300));
                return createImageBitmap(...more);
            };
            const run = document.getElementById("run");
            const again = new MutationObserver(() => {
                if (run.hidden) return;
                again.disconnect();
                setTimeout(() => {
                    window.pressed = document.querySelector(".tile.pending") !== null;
                    run.click();
                });
            });
            again.observe(run, { attributeFilter: ["hidden"] });
        }"""
    )
    page.click("#run")
    small.finished(2)
    assert page.evaluate("window.pressed"), "while the picture was being decoded"
    assert posted == ["jobs", "jobs"]
    sync_api.expect(page.locator(".tile")).to_have_count(2)
    assert page.evaluate("[...window.urls]") == [page.evaluate("document.getElementById('download').href")]


def test_without_memory_for_the_mask_nothing_is_sent(small):
    page = small.page
    posted = sent(page, "POST")
    page.evaluate("() => { HTMLCanvasElement.prototype.toBlob = (done) => done(null); }")
    page.click("#run")
    sync_api.expect(page.get_by_role("alert")).to_contain_text("out of memory for the mask")
    sync_api.expect(page.locator(".tile")).to_have_count(0)
    assert posted == []
    assert page.input_value("#prompt") == "a heart"


def test_the_photo_opened_last_stays_and_keeps_its_mask(studio, tmp_path):
    page = studio.page
    for name, size in {"slow": (120, 80), "quick": (96, 64)}.items():
        Image.new("RGB", size, (90, 120, 150)).save(tmp_path / f"{name}.png")
    posted = sent(page, "POST")
    page.evaluate(
        """() => {
            const { createImageBitmap } = window;
            const held = new Promise((done) => (window.release = done));
            window.createImageBitmap = async (blob, ...more) => {
                if (blob.name === "slow.png") await held;
                return createImageBitmap(blob, ...more);
            };
        }"""
    )
    page.set_input_files("#file", tmp_path / "slow.png")
    studio.open(tmp_path / "quick.png")
    studio.box(16, 16, 48, 32)
    facts = page.locator("#facts")
    sync_api.expect(facts).to_contain_text("mask 25 %")
    page.evaluate("window.release()")
    page.wait_for_timeout(200)
    sync_api.expect(facts).to_contain_text("96 × 64")
    sync_api.expect(facts).to_contain_text("mask 25 %")
    assert posted == ["documents"]


def test_cancel_works_while_the_photo_or_the_job_is_being_sent(studio, base, tmp_path):
    page = studio.page
    held: list[sync_api.Route] = []
    page.route("**/v1/documents", lambda route: held.append(route))
    page.route("**/v1/jobs", lambda route: held.append(route))
    Image.new("RGB", (96, 64), (90, 120, 150)).save(tmp_path / "small.png")
    studio.open(tmp_path / "small.png")
    studio.box(16, 16, 32, 32)
    page.fill("#prompt", "a late heart")
    told = page.locator("#notices .done")

    def cancelled(asked: int) -> None:
        page.click("#run")
        sync_api.expect(page.locator("#status")).to_have_text("Sending…")
        page.wait_for_timeout(100)
        assert len(held) == asked
        page.click("#cancel")
        sync_api.expect(told).to_contain_text("Cancelled", timeout=2000)
        studio.finished(0)

    cancelled(1)
    with page.expect_response("**/v1/documents"):
        held[0].continue_()
    cancelled(2)
    with page.expect_response(lambda answer: answer.request.method == "DELETE") as ended:
        held[1].continue_()
    assert ended.value.ok
    assert ended.value.json()["prompt"] == "a late heart"


def test_a_turned_photo_and_a_document_that_the_server_forgot(studio, base, tmp_path):
    turned = Image.new("RGB", (160, 96), (90, 120, 150))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    page = studio.page
    with page.expect_response("**/v1/documents") as answer:
        studio.open(tmp_path / "turned.jpg")
    sync_api.expect(page.locator("#facts")).to_contain_text("96 × 160")
    page.request.delete(f"{base}/v1/documents/{answer.value.json()['id']}")
    studio.box(16, 100, 48, 48)
    page.fill("#prompt", "a heart")
    page.click("#run")
    studio.finished(1)
    assert studio.downloaded().shape == (160, 96, 3)
    assert [text for text in studio.wrong if "404" not in text] == []
    studio.wrong.clear()


def test_the_key_is_asked_for_once_and_sent(studio, base):
    page = studio.page

    def guard(route: sync_api.Route) -> None:
        headers = route.request.headers
        if headers.pop("authorization", None) == "Bearer sesame":
            route.continue_(headers=headers)
        else:
            error = {"message": "Give a key.", "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
            route.fulfill(status=401, json={"error": error})

    page.route("**/v1/**", guard)
    page.reload()
    page.fill("#key-field", "wrong")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#key-wrong")).to_be_visible()
    page.fill("#key-field", "sesame")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#model")).to_contain_text("retouch")
    assert [text for text in studio.wrong if "401" not in text] == []
    studio.wrong.clear()


def test_live_shows_figures_that_move(studio):
    page = studio.page
    studio.open()
    studio.box(200, 100, 64, 64)
    page.fill("#prompt", "a ladybug")

    def done_after_an_edit(results: int) -> int:
        page.click("#tab-edit")
        page.click("#run")
        studio.finished(results)
        page.focus("#tab-edit")
        page.keyboard.press("ArrowRight")
        sync_api.expect(page.locator("#rate-note")).to_contain_text(re.compile(r"\d done"))
        page.wait_for_timeout(1500)
        return int(re.sub(r"\D.*", "", page.inner_text("#rate-note").replace(",", "")))

    first = done_after_an_edit(1)
    assert done_after_an_edit(2) == first + 1
    assert page.inner_text("#latency-value") != "–"
    assert page.locator("#cache-rows tr").count() >= 3
    assert "%" in page.inner_text("#saved-share")
    jobs = page.locator("#job-rows tr").filter(has_text="a ladybug")
    listed = jobs.count()
    jobs.first.get_by_role("button", name="Clear").click()
    sync_api.expect(jobs).to_have_count(listed - 1)


@pytest.mark.parametrize(("theme", "width", "height"), [("dark", 360, 740), ("light", 1600, 1000)])
def test_looks(browser, base, theme, width, height):
    """System colours, the toggle, no sideways scrolling, every control named; also where motion is not wanted."""
    size = {"width": width, "height": height}
    studio = Studio(browser, base, viewport=size, color_scheme=theme, reduced_motion="reduce", has_touch=width < 500)
    page = studio.page
    page.click("#empty-scene")
    page.wait_for_selector(".edit.loaded")
    assert (brightness(page) < 64) == (theme == "dark")
    for tab in ["#tab-edit", "#tab-live"]:
        page.click(tab)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(
            "[...document.querySelectorAll('[role=tabpanel]:not([hidden])')].every(m => m.scrollWidth <= m.clientWidth)"
        )
    names = page.locator("button, a, input, textarea, [tabindex]").evaluate_all(
        """all => all.filter(e => !(e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim())).map(e => e.id)"""
    )
    assert names == []
    page.click("#theme")
    assert (brightness(page) < 64) == (theme != "dark")
    page.click("#help-open")
    page.get_by_role("dialog", name="Shortcuts").get_by_role("button", name="Close").click()
    studio.context.close()
    assert studio.wrong == []


def brightness(page: sync_api.Page) -> int:
    return int(re.search(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[0])
