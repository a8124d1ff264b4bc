"""The tensors of `/v2`: which there are, and how they are read and written, in JSON or as bytes after it.

Source: Triton Inference Server's docs/protocol/extension_binary_data.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from retouch.serve.errors import BadRequest

HEADER = "Inference-Header-Content-Length"

DTYPES = {"UINT8": np.uint8, "BOOL": np.bool_, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}

FITTING = {"u": "iu", "i": "iu", "b": "biu", "f": "iuf"}
"""Kind of a datatype -> kinds of numbers in JSON that it may be given as."""

INPUTS = {
    "image": ("UINT8", [-1, -1, -1]), "mask": ("BOOL", [-1, -1]), "prompt": ("BYTES", [1]), "seed": ("INT64", [1]),
    "n": ("INT32", [1]), "num_inference_steps": ("INT32", [1]), "guidance_scale": ("FP32", [1]),
    "negative_prompt": ("BYTES", [1]),
}  # fmt: skip
"""Name -> (datatype, shape). image (height, width, 3 or 4) and prompt are needed; a mask may be UINT8 too, 0 = leave alone."""

PARAMETERS = ("priority", "timeout", "binary_data_output", "sequence_id", "sequence_start", "sequence_end")
"""Of a request. Those of sequences change nothing: no request depends on an earlier one here."""

OF_FILTERS = ("image", "mask", "prompt")
"""Inputs that a filter has; the mask is for those that keep the picture's size, and the prompt is not read."""

OUTPUTS = {"image": ("UINT8", [-1, -1, -1, -1]), "seed": ("INT64", [-1]), "usage": ("BYTES", [1])}


@dataclass(frozen=True, slots=True)
class Tensor:
    datatype: str
    array: np.ndarray

    def one(self, name: str) -> Any:
        """The only element. Raises BadRequest."""
        if self.array.size != 1:
            raise BadRequest(f"{name} has {self.array.size} elements; give one.", name)
        return self.array.reshape(-1)[0]


def read(body: bytes, text: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A request's JSON, and its input tensors by name. `text` is what HEADER said, how many of the bytes are JSON."""
    text = str(len(body)) if text is None else text
    if not text.isdecimal() or len(text) > 15 or int(text) > len(body):
        raise BadRequest(f"{HEADER} is {text[:20]!r}; the body has {len(body)} bytes.")
    try:
        head = json.loads(body[: int(text)])
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the request is no JSON: {error}.") from error
    if not isinstance(head, dict) or not isinstance(head.get("inputs"), list):
        raise BadRequest("the request has to be an object with a list of inputs.")
    inputs, rest = {}, memoryview(body)[int(text) :]
    for entry in head["inputs"]:
        name, tensor, rest = _tensor(entry, rest)
        if name in inputs:
            raise BadRequest(f"{name} is given twice; give it once.", name)
        inputs[name] = tensor
    if len(rest):
        raise BadRequest(f"the body has {len(rest)} bytes that belong to no input.")
    return head, inputs


def _tensor(entry: Any, rest: memoryview) -> tuple[str, Tensor, memoryview]:
    name = _name_of(entry, "binary_data_size")
    if name not in INPUTS:
        raise BadRequest(f"{name!r} is not an input; inputs are {', '.join(INPUTS)}.")
    kind, shape = entry.get("datatype"), entry.get("shape")
    if kind != INPUTS[name][0] and not (name == "mask" and kind == "UINT8"):
        raise BadRequest(f"{name} is {kind}; give {INPUTS[name][0]}.", name)
    if not isinstance(shape, list) or not all(type(side) is int and 0 < side < 2**31 for side in shape):
        raise BadRequest(f"{name}: shape is {shape!r}; give whole numbers above 0.", name)
    size = (entry.get("parameters") or {}).get("binary_data_size")
    try:
        if size is None:
            array = _of_json(kind, entry.get("data"))
        else:
            if type(size) is not int or not 0 <= size <= len(rest):
                raise BadRequest(f"{name}: binary_data_size is {size!r}; {len(rest)} bytes are left.", name)
            array, rest = _of_bytes(kind, rest[:size]), rest[size:]
        return name, Tensor(kind, array.reshape(shape)), rest
    except (ValueError, TypeError, OverflowError) as error:
        raise BadRequest(f"{name} does not fit its datatype and shape: {error}.", name) from error


def _name_of(entry: Any, known: str) -> str:
    """Of an input or an output. Raises BadRequest where it has none, or parameters other than the one that is `known`."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise BadRequest("inputs and outputs are lists of objects, each with a name.")
    if not isinstance(entry.get("parameters") or {}, dict):
        raise BadRequest(f"{entry['name']}: parameters is no object.", entry["name"])
    _check_known(entry.get("parameters") or {}, (known,), f"{entry['name']}: ")
    return str(entry["name"])


def _check_known(parameters: dict[str, Any], known: tuple[str, ...], where: str = "") -> None:
    for name in parameters:
        if name not in known:
            raise BadRequest(f"{where}{name} is not a parameter here; leave it out. Known: {', '.join(known)}.", "parameters")


def _of_json(kind: str, data: Any) -> np.ndarray:
    if not isinstance(data, list):
        raise ValueError("data is no list")
    if kind == "BYTES":
        return np.array([_text(item) for item in data], dtype=object)
    array, wanted = np.asarray(data), np.dtype(DTYPES[kind])
    if array.dtype.kind not in FITTING[wanted.kind]:
        raise ValueError("data has values of another kind")
    if wanted.kind in "iu" and array.size:
        range_ = np.iinfo(kind.lower())
        if not range_.min <= array.min() <= array.max() <= range_.max:
            raise ValueError("data has values that it cannot hold")
    return array.astype(wanted).reshape(-1)


def _text(item: Any) -> str:
    if not isinstance(item, str):
        raise ValueError("data is no text")
    return item


def _of_bytes(kind: str, data: memoryview) -> np.ndarray:
    if kind != "BYTES":
        return np.frombuffer(data, DTYPES[kind])
    items, at = [], 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if end > len(data):
            raise ValueError("a text is longer than its tensor")
        items.append(bytes(data[at + 4 : end]).decode())
        at = end
    return np.array(items, dtype=object)


def wanted(head: dict[str, Any]) -> tuple[list[str], set[str]]:
    """Names of the outputs, and those that go as bytes."""
    parameters = head.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise BadRequest("parameters is no object.", "parameters")
    _check_known(parameters, PARAMETERS)
    if not isinstance(head.get("id") or "", str):
        raise BadRequest("id is no text.", "id")
    outputs = head.get("outputs")
    if outputs is None:
        return list(OUTPUTS), set(OUTPUTS) if parameters.get("binary_data_output") is True else set()
    names = [_name_of(one, "binary_data") for one in outputs] if isinstance(outputs, list) else [""]
    if not {*names} <= OUTPUTS.keys():
        raise BadRequest(f"outputs: give a list of objects with a name; outputs are {', '.join(OUTPUTS)}.", "outputs")
    if len({*names}) < len(names):
        raise BadRequest("outputs has a name twice; give each once.", "outputs")
    binary = {one["name"] for one in outputs if (one.get("parameters") or {}).get("binary_data") is True}
    return names or list(OUTPUTS), binary


def written(arrays: dict[str, Any], names: list[str], binary: set[str]) -> tuple[list[dict[str, Any]], list[bytes]]:
    """What a response says of the outputs of these names, and the bytes that follow its JSON. A text comes as its bytes."""
    outputs: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for name in names:
        value, kind = arrays[name], OUTPUTS[name][0]
        shape = [1] if kind == "BYTES" else list(value.shape)
        entry: dict[str, Any] = {"name": name, "datatype": kind, "shape": shape}
        if name in binary:
            blob = len(value).to_bytes(4, "little") + value if kind == "BYTES" else value.tobytes()
            entry["parameters"] = {"binary_data_size": len(blob)}
            blobs.append(blob)
        else:
            entry["data"] = [value.decode()] if kind == "BYTES" else value.reshape(-1).tolist()
        outputs.append(entry)
    return outputs, blobs
