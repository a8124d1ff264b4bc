"""Documents that were uploaded: their files, which may outlive the server, and their pictures."""

from __future__ import annotations

from dataclasses import dataclass

from retouch.picture import Picture


@dataclass(frozen=True, slots=True, eq=False)
class Upload:
    """A document's file as it was sent, and the tenant whose it is."""

    data: bytes
    tenant: str
    created: int

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
    return len(name).to_bytes(4, "little") + upload.created.to_bytes(8, "little") + name + upload.data


def load(data: bytes) -> Upload:
    end = 12 + int.from_bytes(data[:4], "little")
    return Upload(data[end:], data[12:end].decode(), int.from_bytes(data[4:12], "little"))
