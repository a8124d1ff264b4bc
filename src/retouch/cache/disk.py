"""The roomiest tier: one file a value, checked by its digest, there again after a restart. It never stops an edit."""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

from retouch.cache.tier import Sized, Unread

log = logging.getLogger(__name__)

V = TypeVar("V", bound=Sized)

MAGIC = b"RETOUCH1"
HEADER = struct.Struct(f"<{len(MAGIC)}s16sdHQ")
"""Magic, digest of all that follows it, recompute seconds, length of the key, length of the payload; then key and payload."""

ABANDONED = 3600.0
"""Seconds after which a file that was not written to its end is taken for a dead process' and removed."""


class Disk(Generic[V]):
    """`dump` and `load` turn a value into bytes and back. A damaged file is a miss and is removed; a disk that is full or
    read-only is said once, until it can be written again.
    """

    def __init__(self, folder: Path, budget: int, dump: Callable[[V], bytes], load: Callable[[bytes], V]) -> None:
        self.name, self.folder, self.budget = "disk", folder, budget
        self._dump, self._load = dump, load
        self._failed = False

    def put(self, key: str, value: V, seconds: float) -> int | None:
        path, name = self._path(key), key.encode()
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            payload = self._dump(value)
            body = struct.pack("<dHQ", seconds, len(name), len(payload)) + name + payload
            self.folder.mkdir(parents=True, exist_ok=True)
            data = MAGIC + _digest(body) + body
            part.write_bytes(data)
            try:
                os.replace(part, path)
            except FileNotFoundError:  # another process, by whose clock it was abandoned, has removed it
                part.write_bytes(data)
                os.replace(part, path)
        except Exception as error:  # of the disk, or of a device that does not give the value
            if not self._failed:
                log.warning("nothing can be kept in %s: %s", self.folder, error)
            self._failed = True
            with suppress(OSError):
                part.unlink(missing_ok=True)
            return None
        self._failed = False
        return len(MAGIC) + 16 + len(body)

    def get(self, key: str) -> V | None:
        path = self._path(key)
        try:
            data = path.read_bytes()
            found, payload = _read(data)
            if found != key:
                raise ValueError(f"it holds {found!r}")
            return self._load(payload)
        except FileNotFoundError:
            return None
        except (OSError, MemoryError) as error:  # of this moment, not of the file
            log.warning("%s could not be read: %r", path, error)
            raise Unread from error
        except Exception as error:  # whatever a damaged payload makes the loader say
            log.warning("%s is damaged and will be made anew: %s", path, error)
            self.drop(key)
            return None

    def drop(self, key: str) -> None:
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s could not be removed: %s", self._path(key), error)

    def found(self) -> Sequence[tuple[str, int, float]]:
        """What an earlier process left, oldest first. Headers are read here, payloads when they are asked for."""
        entries = []
        for path, _ in sorted(self._files("*.cache"), key=lambda pair: pair[1]):
            try:
                with path.open("rb") as file:
                    magic, _, seconds, length, _ = HEADER.unpack(file.read(HEADER.size))
                    key = file.read(length).decode()
                if magic != MAGIC or path != self._path(key):
                    raise ValueError("not of this version")
                entries.append((key, path.stat().st_size, seconds))
            except (OSError, ValueError, struct.error) as error:
                log.warning("%s is no cache file and is left alone: %s", path, error)
        for path, written in self._files("*.part"):
            if time.time() - written > ABANDONED:
                with suppress(OSError):
                    path.unlink()
        return entries

    def _files(self, pattern: str) -> list[tuple[Path, float]]:
        """With the times they were written at. Another process may remove some in the meantime."""
        found = []
        for path in self.folder.glob(pattern):
            with suppress(OSError):
                found.append((path, path.stat().st_mtime))
        return found

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.cache"


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16).digest()


def _read(data: bytes) -> tuple[str, bytes]:
    """Key and payload of a file's bytes. Raises ValueError or struct.error where they are not as they were written."""
    magic, digest, _, length, size = HEADER.unpack_from(data)
    body = data[len(MAGIC) + 16 :]
    if magic != MAGIC or digest != _digest(body) or len(data) != HEADER.size + length + size:
        raise ValueError("its digest does not match")
    return data[HEADER.size : HEADER.size + length].decode(), data[HEADER.size + length :]
