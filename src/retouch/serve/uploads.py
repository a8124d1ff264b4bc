"""Documents that were uploaded: their files, which may outlive the server, and their pictures."""

from __future__ import annotations

import hashlib
import struct
import time
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from starlette.concurrency import run_in_threadpool

from retouch import picture
from retouch.boxes import Size
from retouch.cache.disk import Disk
from retouch.cache.memory import Memory
from retouch.cache.store import Store
from retouch.edit import InvalidImage, InvalidOption
from retouch.picture import Picture
from retouch.serve.budget import Budget, Claim
from retouch.serve.errors import NotFound, NotKept
from retouch.serve.settings import Settings, Tenant

HEAD, OLD_HEAD = struct.Struct("<IQII"), struct.Struct("<IQ")
"""Length of the tenant's name, when it was uploaded, width and height; then name and file."""

SIZED = 1 << 31
"""Set in the length of the name where the size follows; files of older versions have none."""


@dataclass(frozen=True, slots=True, eq=False)
class Upload:
    """A document's file as it was sent, the tenant whose it is, and the picture's width and height, upright."""

    data: bytes
    tenant: str
    created: int
    size: Size

    @property
    def bytes(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """An upload's picture, kept so that the next edit need not decode it, and the tenant whose it is."""

    photo: Picture
    tenant: str

    @property
    def bytes(self) -> int:
        """With what answers leave in it of its rows as PNG: these take no more than the pixels do, and are not there yet."""
        return 2 * self.photo.pixels.nbytes


class Uploads:
    """The documents of all tenants. The pixels of what is read are claimed of `pixels` before it is."""

    def __init__(self, settings: Settings, pixels: Budget) -> None:
        cache = settings.worker.cache
        self.pixels = pixels
        self.files: Store[Upload] = Store(
            Memory("host", settings.uploads)
            if cache is None
            else Disk(cache / "uploads", settings.worker.disk, dump, load)  # at once, as it outlives a crash
        )
        self.decoded: Store[Decoded] = Store(Memory("host", settings.uploads))
        self.in_flight: WeakValueDictionary[str, Picture] = WeakValueDictionary()  # though `decoded` let them go

    async def add(self, data: bytes, tenant: Tenant) -> tuple[str, Upload]:
        """Keep a picture under an id that its content gives, once it has been read whole. Raises InvalidImage, NotKept."""
        claim = self.pixels.claim()
        try:
            photo = await run_in_threadpool(_read, data, tenant, claim)
        finally:
            claim.release()  # what is kept of it has budgets of its own
        key = "doc_" + hashlib.blake2b(tenant.name.encode() + b"\0" + data, digest_size=16).hexdigest()
        upload = Upload(data, tenant.name, int(time.time()), photo.size)
        if upload.bytes > self.files.tiers[0].budget:
            raise InvalidImage(f"the file has {upload.bytes:,} bytes, more than all documents may have here; save it smaller.")
        await run_in_threadpool(self._keep, key, upload)
        if not self.files.used(key):
            raise NotKept("there is no place for the document (is the disk of --cache full?); send the picture with each edit.")
        self.decoded.put(key, Decoded(self.in_flight.setdefault(key, photo), tenant.name), 0.1)
        return key, upload

    async def find(self, key: str, tenant: Tenant) -> Upload:
        """Raises NotFound, for another tenant's too."""
        return await run_in_threadpool(self._file, key, tenant)

    async def content(self, key: str, tenant: Tenant) -> bytes:
        """A document's picture, as PNG. Raises NotFound; QueueFull, ImageTooLarge where there is no room for it."""
        claim = self.pixels.claim()
        try:
            return await run_in_threadpool(self._content, key, tenant, claim)
        finally:
            claim.release()

    def photo(self, image: bytes | str, tenant: Tenant, claim: Claim) -> Picture:
        """Of a file; or of a document by its id, whose file is not looked at where it is decoded already.

        Raises as `content`.
        """
        if isinstance(image, bytes):
            return _read(image, tenant, claim)
        known = self.decoded.find(image) if image in self.decoded else None  # what is not there, `get` counts below
        if known is not None and known.tenant == tenant.name and self.files.used(image):
            claim.share(image, check_pixels(known.photo.size, tenant))
            return known.photo
        upload = self._file(image, tenant)
        claim.share(image, check_pixels(upload.size, tenant))
        return self.decoded.get(image, partial(self._decoded, image, upload))[0].photo

    def source(self, image: bytes | str, tenant: Tenant) -> bytes:
        """The file as it was sent. Raises NotFound."""
        return image if isinstance(image, bytes) else self._file(image, tenant).data

    def forget(self, key: str) -> None:
        self.decoded.drop(key)
        self.files.drop(key)

    def caches(self) -> dict[str, dict[str, Any]]:
        """How both stores stand, as the worker tells it of its caches."""
        files = self.files.told() | {"saved_seconds": 0.0}  # a file is sent, not made
        return {"uploads": files, "decoded": self.decoded.told()}

    def _keep(self, key: str, upload: Upload) -> None:
        """What lies there is read first: of a disk only the names are known, and a damaged file is written anew."""
        if key in self.files and self.files.find(key) is None:
            self.files.drop(key)
        self.files.put(key, upload, 1.0)

    def _file(self, key: str, tenant: Tenant) -> Upload:
        upload = self.files.find(key)
        if upload is None or upload.tenant != tenant.name:
            raise NotFound(f"there is no document {key}; upload it to /v1/documents (again, where it has been a while).")
        return upload

    def _content(self, key: str, tenant: Tenant, claim: Claim) -> bytes:
        photo = self.photo(key, tenant, claim)
        return photo.rows.file(photo.icc, photo.exif)

    def _decoded(self, key: str, upload: Upload) -> Decoded:
        """The one that is in flight, where there is: all who name a document hold the same pixels, which are counted once."""
        photo = self.in_flight.get(key)
        if photo is None:
            self.in_flight[key] = photo = picture.read(upload.data)
        return Decoded(photo, upload.tenant)


def check_pixels(size: Size, tenant: Tenant) -> int:
    """How many there are. Raises InvalidOption where the key does not allow so many."""
    pixels = size[0] * size[1]
    if tenant.pixels is not None and pixels > tenant.pixels:
        raise InvalidOption(f"the picture has {pixels:,} pixels; this key allows {tenant.pixels:,}.")
    return pixels


def read_mask(data: bytes, size: Size, mode: str, claim: Claim) -> np.ndarray:
    """As `picture.read_mask`; its own pixels are claimed while it is read."""
    width, height = picture.measured(data)
    claim.take(width * height)
    try:
        return picture.read_mask(data, size, mode)
    finally:
        claim.give_back(width * height)


def _read(data: bytes, tenant: Tenant, claim: Claim) -> Picture:
    claim.take(check_pixels(picture.measured(data), tenant))
    return picture.read(data)


def dump(upload: Upload) -> bytes:
    name = upload.tenant.encode()
    width, height = upload.size
    return HEAD.pack(len(name) | SIZED, upload.created, width, height) + name + upload.data


def load(data: bytes) -> Upload:
    length, created = OLD_HEAD.unpack_from(data)
    at = HEAD.size if length & SIZED else OLD_HEAD.size
    end = at + (length & ~SIZED)
    file = data[end:]
    size = HEAD.unpack_from(data)[2:] if length & SIZED else picture.measured(file)
    return Upload(file, data[at:end].decode(), created, size)
