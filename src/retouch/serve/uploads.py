"""Documents that were uploaded: their files, which may outlive the server, and their pictures."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from retouch import picture
from retouch.boxes import Size
from retouch.picture import Picture

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
