"""Every way to say no, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}; under /v2, {"error": message}."""

from __future__ import annotations

import math
import re
from typing import Any, TypeVar

from fastapi.responses import JSONResponse
from pydantic import ValidationError

from retouch.edit import InvalidEdit, InvalidImage, InvalidMask, InvalidPrompt, RetouchError

PARAMS = ((InvalidMask, "mask"), (InvalidImage, "image"), (InvalidPrompt, "prompt"))
"""Error -> the parameter it is about, where the class alone says so."""


class BadRequest(InvalidEdit):
    """The request is not of the form that this endpoint takes. `param` names what is wrong."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class WrongContentType(RetouchError):
    """The body is of a kind that this endpoint does not read."""

    status = 415


class BodyTooLarge(RetouchError):
    """The body has more bytes than the server takes."""

    status = 413


class BodyTooSlow(RetouchError):
    """The body did not arrive in the time that a client is given."""

    status = 408


class Forbidden(RetouchError):
    """The key is known, but it does not open this."""

    status = 403


class NotFound(RetouchError):
    """No such model, document, job or address."""

    status = 404


class NotKept(RetouchError):
    """There is no place for a document here."""

    status = 507


class Draining(RetouchError):
    """The server is stopping, or has not begun."""

    status = 503
    retry_after = 5.0


E = TypeVar("E", bound=RetouchError)
X = TypeVar("X", bound=Exception)


def about(param: str, error: E) -> E:
    """The error, which says from now on that it is about this parameter."""
    error.param = param  # type: ignore[attr-defined]
    return error


def counted(error: X) -> X:
    """The error of a run, which is counted with the run and not once more where it is answered."""
    error.counted = True  # type: ignore[attr-defined]
    return error


def body_of(error: Exception) -> dict[str, Any]:
    """The JSON that says it."""
    kind = next((name for low, name in ((500, "server_error"), (400, "invalid_request_error")) if status_of(error) >= low), "")
    kind = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error", 504: "server_error"}.get(
        status_of(error), kind
    )
    param = getattr(error, "param", None) or next((param for cls, param in PARAMS if isinstance(error, cls)), None)
    known = isinstance(error, RetouchError)
    code = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower() if known else "internal_error"
    message = str(error) if known else "something went wrong inside; the server's log says what."
    return {"error": {"message": _plain(message), "type": kind, "param": param and _plain(param), "code": code}}


def _plain(text: str) -> str:
    """What was sent may be quoted: whatever it was, it can be written, and it is not long."""
    return text[:1000].encode(errors="replace").decode()


def status_of(error: Exception) -> int:
    return error.status if isinstance(error, RetouchError) else 500


def response_of(error: Exception, path: str = "") -> JSONResponse:
    """`path` is what was asked: the Open Inference Protocol has a shape of its own."""
    body, headers = body_of(error), {}
    if path.startswith("/v2"):
        body = {"error": body["error"]["message"]}
    wait = getattr(error, "retry_after", None)
    if wait is not None or status_of(error) == 503:
        headers["Retry-After"] = str(max(1, math.ceil(wait or 1)))
    if status_of(error) == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body, status_of(error), headers)


def of_validation(error: ValidationError) -> BadRequest:
    """The first of what is wrong with a body, in words."""
    first = error.errors(include_url=False, include_input=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        return BadRequest(f"{param} is not a field of this request; leave it out.", param)
    if first["type"] == "missing":
        return BadRequest(f"{param} is missing; give it.", param)
    return BadRequest(f"{param or 'the body'}: {first['msg']}.", param)
