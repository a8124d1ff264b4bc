"""Any server that has OpenAI's `POST /v1/images/edits`, as a target. Retouch's own extensions are used where it has them."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from PIL import Image

from retouch import picture
from retouch.edit import InvalidOption, Usage
from retouch.measure.plan import Call
from retouch.measure.targets import Failed, Served

if TYPE_CHECKING:
    import httpx

EXTENSIONS = frozenset(("documents", "seed", "num_inference_steps", "mask_mode", "priority", "deadline_ms", "use_cache"))
"""What a Retouch server takes beside OpenAI's fields. `documents`: pictures are sent once, to /v1/documents, and named."""

BOUNDARY = "retouch-measure-8f1d2c"
KINDS = ((b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpeg"), (b"RIFF", "webp"))
SIZE = re.compile(r"[0-9]{1,6}x[0-9]{1,6}")


@dataclass(slots=True, eq=False)
class _Sent:
    """A document: the file that is sent along, or the id of an upload."""

    file: bytes = b""
    id: str = ""


class Endpoint:
    """`url` is a server's address, with or without /v1. `send` are the EXTENSIONS that it is sent; None: all of them where its
    /v1/models says that it is a Retouch, else none. `keys` are API keys by tenant, "" for whoever has none; `fields` go with
    each request as they are. An answer may take `timeout` seconds. Raises InvalidOption.
    """

    def __init__(
        self, url: str, send: Iterable[str] | None = None, keys: Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None, timeout: float = 600.0, transport: Any = None,
    ) -> None:  # fmt: skip
        self._httpx = _imported()
        if not re.match(r"https?://[^/\s]", url):
            raise InvalidOption(f"{url!r} is no address of a server; give one such as http://127.0.0.1:8000.")
        self.name = url.rstrip("/").removesuffix("/v1")
        self.sends = None if send is None else frozenset(send)
        unknown = sorted((self.sends or frozenset()) - EXTENSIONS)
        if unknown:
            raise InvalidOption(f"there is no extension {', '.join(unknown)}; there are {', '.join(sorted(EXTENSIONS))}.")
        self.keys, self.fields, self.timeout, self._transport = keys or {}, fields or {}, timeout, transport
        self.told: dict[str, Any] = {}

    async def __aenter__(self) -> Self:
        limits = self._httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = self._httpx.Timeout(self.timeout, connect=min(10.0, self.timeout))
        self._client: httpx.AsyncClient = self._httpx.AsyncClient(
            base_url=self.name, timeout=timeout, limits=limits, transport=self._transport
        )
        if self.sends is None:
            self.told = await self._of_models()
            self.sends = EXTENSIONS if self.told else frozenset()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        await self._client.aclose()

    async def _of_models(self) -> dict[str, Any]:
        """What a Retouch server says of itself; nothing of others, nor where none is there."""
        try:
            key = next(iter(self.keys.values()), "")
            async with asyncio.timeout(min(10.0, self.timeout)):
                answer = await self._client.get("/v1/models", headers=_auth(key))
            told = answer.json()["data"][0]["retouch"]
        except (self._httpx.HTTPError, TimeoutError, ValueError, LookupError, TypeError):
            return {}
        return told if isinstance(told, dict) else {}

    async def document(self, image: np.ndarray, tenant: str) -> _Sent:
        return await self.kept(picture.encode(image, "PNG"), tenant)

    async def kept(self, made: bytes, tenant: str) -> _Sent:
        if "documents" not in (self.sends or ()):
            return _Sent(made)
        body = _file("file", made) + _end()
        answer = await self._post("/v1/documents", body, tenant)
        if answer.status_code not in (200, 201):
            raise self._refused(answer, "upload: ")
        try:
            return _Sent(id=str(answer.json()["id"]))
        except (ValueError, LookupError, TypeError) as error:
            raise Failed("no document id", f"the upload was answered with {answer.text[:100]!r}") from error

    def prepare(self, call: Call) -> bytes:
        """The form but for the picture. Raises InvalidTrace where the mask is empty."""
        sends = self.sends or frozenset()
        texts = {"prompt": call.prompt, "n": str(call.n), **self.fields}
        own = {
            "seed": call.seed, "num_inference_steps": call.steps, "priority": call.priority or None,
            "deadline_ms": None if call.deadline is None else max(1, round(call.deadline * 1000)),
            "use_cache": None if call.reuse else "false",
        }  # fmt: skip
        texts |= {name: str(value) for name, value in own.items() if name in sends and value is not None}
        mask = call.drawn()
        form = b""
        if mask is not None:
            white = "mask_mode" in sends
            texts |= {"mask_mode": "white"} if white else {}
            form = _file("mask", _white(mask) if white else _transparent(mask))
        return b"".join(_part(f'name="{name}"', "", text.encode()) for name, text in texts.items()) + form

    async def send(self, call: Call, prepared: bytes, document: _Sent) -> Served:
        named = _part('name="document"', "", document.id.encode()) if document.id else _file("image", document.file)
        answer = await self._post("/v1/images/edits", prepared + named + _end(), call.tenant)
        ended = time.perf_counter()
        if answer.status_code != 200:
            raise self._refused(answer)
        try:
            made, usage = _pictures(call, answer.content)
        except Failed as error:
            error.status, error.ended = 200, ended
            raise
        return Served(ended, made, len(answer.content), 200, usage)

    async def _post(self, path: str, body: bytes, tenant: str) -> httpx.Response:
        key = self.keys.get(tenant, self.keys.get("", ""))
        headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}", **_auth(key)}
        try:
            async with asyncio.timeout(self.timeout):
                return await self._client.post(path, content=body, headers=headers)
        except (self._httpx.TimeoutException, TimeoutError) as error:
            if isinstance(error, self._httpx.ConnectTimeout):
                raise Failed("unreachable", f"{self.name} takes no connection") from error
            raise Failed("timeout", f"no answer in {self.timeout:g} s") from error
        except self._httpx.ConnectError as error:
            raise Failed("unreachable", f"{self.name}: {error}") from error
        except self._httpx.HTTPError as error:
            raise Failed("connection lost", f"{type(error).__name__}: {error}") from error

    def _refused(self, answer: httpx.Response, what: str = "") -> Failed:
        """By its status, and by the code in an error of OpenAI's form."""
        code, message = "", answer.text[:200]
        try:
            error = answer.json()["error"]
            code, message = str(error.get("code") or error.get("type") or ""), str(error.get("message") or "")
        except (ValueError, LookupError, TypeError, AttributeError):
            pass
        return Failed(f"{what}{answer.status_code} {code or answer.reason_phrase}".strip()[:80], message, answer.status_code)


def _imported() -> Any:
    try:
        import httpx
    except ImportError as error:
        raise InvalidOption("requests over HTTP need httpx: pip install 'retouch[bench]', or use --engine.") from error
    return httpx


def _auth(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _part(disposition: str, kind: str, content: bytes) -> bytes:
    return f"--{BOUNDARY}\r\nContent-Disposition: form-data; {disposition}\r\n{kind}\r\n".encode() + content + b"\r\n"


def _file(name: str, data: bytes) -> bytes:
    kind = next((kind for start, kind in KINDS if data.startswith(start)), "png")
    return _part(f'name="{name}"; filename="{name}.{kind}"', f"Content-Type: image/{kind}\r\n", data)


def _end() -> bytes:
    return f"--{BOUNDARY}--\r\n".encode()


def _white(mask: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return buffer.getvalue()


def _transparent(mask: np.ndarray) -> bytes:
    """OpenAI's: alpha is 0 where it is edited."""
    pixels = np.zeros((*mask.shape, 4), np.uint8)
    pixels[..., 3] = np.where(mask, 0, 255)
    return picture.encode(pixels, "PNG")


def _pictures(call: Call, content: bytes) -> tuple[list[bytes], Usage | None]:
    """The answer's files, once their number and sizes are what was asked. Raises Failed."""
    try:
        body = json.loads(content)
        made = [base64.b64decode(one["b64_json"], validate=True) for one in body["data"]]
        sizes = [Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")).size for data in made]
    except Exception as error:  # a decoder may raise anything on strange bytes
        raise Failed("no picture", f"{type(error).__name__} {error} in the answer {content[:80]!r}") from error
    if len(made) != call.n:
        raise Failed("wrong number of pictures", f"{call.n} were asked for, {len(made)} came")
    wanted, told = "x".join(map(str, call.size)), body.get("size")
    for size in sizes:
        have = "x".join(map(str, size))
        if isinstance(told, str) and SIZE.fullmatch(told) and told != have:
            raise Failed("wrong size", f"the answer says {told}, but its picture is {have}")
        if have != wanted:
            raise Failed("wrong size", f"the document is {wanted}, the answer's picture {have}")
    return made, _usage(body)


def _usage(body: Mapping[str, Any]) -> Usage | None:
    """Of a Retouch server."""
    try:
        told = body["usage"]["retouch"]
        seconds = {str(stage): float(spent) for stage, spent in told["seconds"].items()}
        return Usage(
            seconds, int(told["tokens_computed"]), int(told["tokens_whole"]), 0, int(told["steps"]), tuple(told["cache_hits"]),
            tuple(told["approximate"]),
        )  # fmt: skip
    except (LookupError, TypeError, ValueError, AttributeError):
        return None
