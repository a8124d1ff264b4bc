"""What an edit does not do again: coding rows that it left alone, decoding a document, sending pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from retouch import picture, png
from retouch.picture import Picture
from retouch.serve.budget import Budget
from retouch.serve.forms import EditFields
from retouch.serve.orders import Order, order_of
from retouch.serve.settings import Settings, Tenant
from serving import Serving, area, decoded, encoded, form, painted, photo, white_mask


def ordered(pixels: np.ndarray, mask: np.ndarray | None, side: int = 512, **fields: Any) -> Order:
    asked = EditFields(prompt="a cat", **fields)
    return order_of(asked, Picture(pixels), mask, (), Tenant("ann"), 4, side, 7, Budget(1 << 30, "pixels").claim())


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("side", [64, 512])
@pytest.mark.parametrize("kind", ["png", "webp"])
def test_the_file_is_that_of_the_whole_picture(channels: int, side: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the worker sees all of the picture or a crop, for one variation after the other."""
    monkeypatch.setattr(png, "BAND", 3000)
    pixels, mask = photo(300, 200, channels), area(300, 200, (130, 90, 170, 110))
    order = ordered(pixels, mask, side, n=3, output_format=kind)
    assert [edit.seed for edit in order.edits] == [7, 8, 9]
    assert (side == 64) == (order.edits[0].image.shape != pixels.shape)
    for edit in order.edits:
        crop = painted(edit)
        whole = order.whole(crop)
        assert (whole[~mask] == pixels[~mask]).all()
        assert (whole[mask] != pixels[mask]).any()
        assert order.file(crop) == picture.encode(whole, kind.upper())


def test_variations_share_their_pixels_and_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "BAND", 1000)
    coded: list[int] = []
    monkeypatch.setattr(png, "_coded", lambda rows, code=png._coded: coded.append(len(rows)) or code(rows))
    order = ordered(photo(300, 200), area(300, 200, (130, 90, 170, 110)), n=2)
    assert order.edits[0].image is order.edits[1].image
    assert np.shares_memory(order.edits[0].image, order.photo.pixels)
    for edit, rows in zip(order.edits, (200, 20), strict=True):
        coded.clear()
        order.file(painted(edit))
        assert sum(coded) == rows


def test_without_a_mask_all_is_coded() -> None:
    order = ordered(photo(), None)
    crop = painted(order.edits[0])
    assert order.file(crop) == png.encode(crop)


def test_a_named_document_is_read_once_and_its_rows_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, mask = photo(300, 200), area(300, 200, (130, 90, 170, 110))
    with Serving() as server:
        document = server.post("/v1/documents", files={"file": ("x", encoded(pixels))}).json()["id"]
        monkeypatch.setattr(server.service.uploads, "_file", lambda *_: pytest.fail("its file is looked at"))
        answers = [server.edit(None, white_mask(mask), document=document, mask_mode="white", seed=i) for i in range(3)]
        assert len({id(one.edit.image.base) for one in server.worker.asked}) == 1, "the very same pixels for all"
        kept = server.service.uploads.decoded.find(document)
        assert kept is not None
        assert sum(band is not None for band in kept.photo.rows._bands) >= len(kept.photo.rows._bands) - 2
        held = sum(len(band.chunk) for band in kept.photo.rows._bands if band is not None)
        assert kept.photo.pixels.nbytes + held <= kept.bytes * 1.01
        monkeypatch.undo()
        server.service.uploads.files.drop(document)
        gone = server.edit(None, white_mask(mask), document=document)
    for answer in answers:
        made = decoded(answer.json()["data"][0]["b64_json"])
        assert (made[~mask] == pixels[~mask]).all()
    assert gone.status_code == 404, "a document that was let go is not there, though its picture may be"


def test_another_tenants_document_is_not_at_hand() -> None:
    ann, ben = ({"Authorization": f"Bearer {key}"} for key in ("a", "b"))
    with Serving(Settings(tenants=(Tenant("ann", "a"), Tenant("ben", "b")))) as server:
        document = server.post("/v1/documents", files={"file": ("x", encoded(photo()))}, headers=ann).json()["id"]
        sent = form(None, white_mask(area()), document=document, mask_mode="white")
        assert server.post("/v1/images/edits", headers=ann, **sent).status_code == 200
        assert server.post("/v1/images/edits", headers=ben, **sent).status_code == 404
