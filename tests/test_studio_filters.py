"""The studio's buttons for filters, in a real browser. Skipped where that of `test_studio` is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import test_filter
from retouch.engine.worker import Options
from serving import Serving
from test_serve_filters import Filtering
from test_studio import PATIENCE_MS, PHOTO, Studio, browser, focus, sync_api, visit  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("filters")
    paths = []
    for name, graph, output in (
        ("remove-background", test_filter.brightness, 'kind = "mask"'),
        ("upscale", test_filter.doubled, "scale = 2"),
    ):
        (folder / name).mkdir()
        graph(folder / name / "made.onnx")
        paths.append(test_filter.toml(folder / name, output=output, more=f'name = "{name}"'))
    with Serving(worker=Filtering(Options(filters=tuple(paths)))) as server:
        yield server


@pytest.fixture
def studio(browser: sync_api.Browser, server: Serving) -> Iterator[Studio]:  # noqa: F811
    with visit(browser, server.url) as studio:
        yield studio


def downloaded(studio: Studio) -> np.ndarray:
    with studio.page.expect_download() as download:
        studio.page.click("#download")
    return np.asarray(Image.open(Path(download.value.path())))


def test_the_whole_photo_is_filtered_at_the_press_of_a_button(studio: Studio) -> None:
    page = studio.page
    buttons = page.locator("#filter-buttons button")
    sync_api.expect(buttons).to_have_text(["Remove background", "Upscale 2×"])
    page.get_by_role("button", name="Remove background").click()
    sync_api.expect(page.locator("#notices")).to_contain_text("Open a photo first")

    studio.open()
    page.fill("#prompt", "a red apple")
    photo = np.asarray(Image.open(PHOTO).convert("RGB"))
    focus(page, "run")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    studio.finished(1)
    assert page.evaluate("document.activeElement.textContent") == "Remove background", "where it was"
    cut = downloaded(studio)
    assert np.array_equal(cut[..., :3], photo)
    assert np.abs(cut[..., 3] - photo.mean(2)).max() <= 0.51
    sync_api.expect(page.locator("#details-prompt")).to_have_text("Remove background")

    page.get_by_role("button", name="Upscale 2×").click()
    studio.finished(2)
    assert np.array_equal(downloaded(studio), photo.repeat(2, 0).repeat(2, 1))
    sync_api.expect(page.locator("#details-facts")).to_have_text(f"{2 * photo.shape[1]} × {2 * photo.shape[0]}")
    page.click("#again")
    assert page.input_value("#prompt") == "a red apple"
    page.click("#tab-live")
    sync_api.expect(page.locator("#job-rows")).to_contain_text("upscale")


def test_a_server_without_filters_shows_no_buttons(browser: sync_api.Browser) -> None:  # noqa: F811
    with Serving() as server:
        studio = Studio(browser, server.url)
        sync_api.expect(studio.page.locator("#model")).to_contain_text("retouch-mini", timeout=PATIENCE_MS)
        assert studio.page.locator("#filters").is_hidden()
        studio.context.close()
    assert studio.wrong == []
