"""Filters beside the model: what a request may say to one, and the order that becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from retouch import picture
from retouch.boxes import Size
from retouch.edit import Edit, ImageTooLarge, InvalidOption
from retouch.models.filters import spec as specs
from retouch.picture import Picture
from retouch.serve.budget import Claim
from retouch.serve.errors import BadRequest, about
from retouch.serve.forms import EditFields
from retouch.serve.orders import Order, check_file
from retouch.serve.settings import Tenant

UNFIT = ("seed", "quality", "num_inference_steps", "guidance_scale", "negative_prompt", "adapters", "partial_images")
"""Fields that say how a model denoises."""


@dataclass(frozen=True, slots=True)
class Served:
    """What the worker says of a filter: an `image` of `scale` times the sides, or a `mask` that becomes transparency."""

    name: str
    kind: specs.Kind
    scale: int
    about: str = ""
    source: str = ""

    def size(self, size: Size) -> Size:
        """Of what it makes of a picture of `size`."""
        return size[0] * self.scale, size[1] * self.scale

    def described(self) -> dict[str, Any]:
        """As `GET /v1/models` tells it."""
        told = {"type": "filter", **asdict(self)}
        del told["name"]
        return told

    def check(self, fields: EditFields, images: int, masked: bool) -> None:
        """What can be told before a picture is decoded. Raises BadRequest, InvalidOption."""
        for name in UNFIT:
            if getattr(fields, name) != EditFields.model_fields[name].default:
                raise BadRequest(f"{self.name} is a filter, and has no use for {name}; leave it out.", name)
        if fields.n > 1:
            raise BadRequest(f"{self.name} makes one picture of a picture, always the same; leave n out, or give 1.", "n")
        if images > 1:
            raise BadRequest(f"{self.name} works on one picture; send it alone.", "image")
        if masked and (self.kind == "mask" or self.scale > 1):
            raise about("mask", InvalidOption(f"{self.name} makes a whole new picture; leave the mask out."))
        if self.kind == "mask" and fields.background == "opaque":
            raise BadRequest(f"{self.name} makes the background transparent; leave background out.", "background")
        if self.kind == "mask" and fields.output_format == "jpeg":
            raise InvalidOption(f"{self.name} makes transparency, which jpeg cannot keep; ask for png or webp.")


def check_filters(names: Sequence[str], model: str) -> None:
    """What can be told before the model is loaded. Raises UnknownCheckpoint that says what to install, CheckpointMismatch,
    InvalidOption where two models have one name.
    """
    taken = {model}
    for name in names:
        path = specs.find(name)
        spec = specs.read(path)
        specs.weights_of(spec, path)
        if spec.name in taken:
            raise InvalidOption(f"two models would be called {spec.name!r}; give the filter's TOML another name.")
        taken.add(spec.name)


def filter_order(
    fields: EditFields, photo: Picture, mask: np.ndarray | None, tenant: Tenant, filter: Served, claim: Claim
) -> Order:
    """Of the whole picture. `filter.check` has been called. Raises InvalidEdit's errors, QueueFull."""
    width, height = filter.size(photo.size)
    if fields.size not in ("auto", f"{width}x{height}"):
        raise InvalidOption(f"size is {fields.size}, but {filter.name} makes {width}x{height} of it; leave it out.")
    made = f"{filter.name} would make {width} x {height} pixels of it"
    if width * height > picture.MAX_PIXELS:
        raise ImageTooLarge(f"{made}, more than {picture.MAX_PIXELS / 1e6:,.0f} megapixels; scale it down.")
    if tenant.pixels is not None and width * height > tenant.pixels:
        raise about("image", InvalidOption(f"{made}; this key allows {tenant.pixels:,} of a picture. Scale it down."))
    check_file(fields, photo, (width, height))
    claim.take(width * height)
    deadline = None if fields.deadline_ms is None else fields.deadline_ms / 1000
    edit = Edit(
        photo.pixels, filter.name, mask=mask, priority=fields.priority, deadline=deadline, tenant=tenant.name,
        reuse=fields.use_cache,
    )  # fmt: skip
    return Order(fields, photo, (0, 0, *photo.size), (edit,), claim, filter=filter.name, scale=filter.scale)
