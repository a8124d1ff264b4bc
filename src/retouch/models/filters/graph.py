"""The graph of a filter: ONNX by onnxruntime, or ncnn by torch; and whether it is the one that its TOML describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from retouch.edit import CheckpointMismatch, InvalidOption
from retouch.models.filters.ncnn import Ncnn
from retouch.models.filters.spec import Spec

Shape = tuple[int | None, ...]
"""None where a side may be anything."""

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Graph(Protocol):
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]

    def run(self, x: np.ndarray) -> np.ndarray:
        """(N, ...) float32, laid out as the TOML says, to the output it names, float32."""


class Onnx:
    """On a GPU where onnxruntime has one, else on as many threads as torch has."""

    def __init__(self, path: Path, wanted: Spec) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise InvalidOption("filters of ONNX graphs need onnxruntime: pip install 'retouch[filters]'.") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        there = onnxruntime.get_available_providers()
        providers = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in there]
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # it has a dozen kinds, none of them public
            raise CheckpointMismatch(f"{path} is damaged, or no ONNX graph ({_line(error)}); get it again.") from error
        self.inputs = {i.name: _shape(i.shape) for i in self.session.get_inputs()}
        self.outputs = {o.name: _shape(o.shape) for o in self.session.get_outputs()}
        self.types = {i.name: i.type for i in self.session.get_inputs()}
        self.input, self.output = wanted.input.name, wanted.output.name
        if wrong := [name for name, kind in self.types.items() if kind not in TYPES]:
            raise CheckpointMismatch(f"the input {wrong[0]} is {self.types[wrong[0]]}; served are {', '.join(TYPES)}.")
        given = wanted.constants.items()
        self.constants = {name: value.astype(TYPES[self.types[name]]) for name, value in given if name in self.types}

    def run(self, x: np.ndarray) -> np.ndarray:
        try:
            image = x.astype(TYPES[self.types[self.input]], copy=False)
            out = self.session.run([self.output], {self.input: image, **self.constants})[0]
        except Exception as error:
            taken = "x".join(map(str, x.shape))
            raise CheckpointMismatch(f"the graph does not take {taken} ({_line(error)}); mend [size] of its TOML.") from error
        return np.asarray(out, np.float32)


def open_graph(spec: Spec, path: Path) -> Graph:
    """Raises CheckpointMismatch where the file is damaged or not what `spec` describes, InvalidOption where an extra lacks."""
    graph: Graph
    if path.suffix == ".onnx":
        graph = Onnx(path, spec)
    elif path.suffix == ".param":
        graph = Ncnn(path)
    else:
        raise CheckpointMismatch(f"{path} is neither .onnx nor ncnn's .param (with its .bin beside it).")
    check(spec, graph)
    return graph


def check(spec: Spec, graph: Graph) -> None:
    """What can be told before the graph is run: names, ranks, channels and sides that are fixed in it."""
    for part, name, there in (("input", spec.input.name, graph.inputs), ("output", spec.output.name, graph.outputs)):
        if name not in there:
            raise CheckpointMismatch(f"{spec.name}: the graph has no {part} {name!r}; it has {', '.join(there)}.")
    if (further := set(graph.inputs) - {spec.input.name}) != set(spec.constants):
        raise CheckpointMismatch(
            f"{spec.name}: the graph's further inputs are {sorted(further)}, its [constants] {sorted(spec.constants)}; "
            "give each of them, and no others."
        )
    for name, value in spec.constants.items():
        shape = graph.inputs[name]
        if len(shape) != value.ndim or any(a not in (None, b) for a, b in zip(shape, value.shape, strict=True)):
            raise CheckpointMismatch(f"{spec.name}: the constant {name} is of shape {value.shape}, the graph wants {shape}.")
    given = graph.inputs[spec.input.name]
    if len(given) != 4:
        raise CheckpointMismatch(f"{spec.name}: the input has {len(given)} axes; served are four, NCHW or NHWC.")
    batch, channels, height, width = axes(given, spec)
    if batch not in (None, 1):
        raise CheckpointMismatch(f"{spec.name}: the graph takes {batch} pictures at a time; served are 1 or any number.")
    if channels not in (None, 3):
        raise CheckpointMismatch(f"{spec.name}: the input has {channels} channels as {spec.input.layout}; 3 are served.")
    for what, fixed, side in (("width", width, spec.size.side[0]), ("height", height, spec.size.side[1])):
        if fixed not in (None, side):
            said = f"side {list(spec.size.side)}" if spec.size.rule in ("fixed", "resize") else f"rule {spec.size.rule!r}"
            raise CheckpointMismatch(f"{spec.name}: the graph's {what} is {fixed}, the TOML says {said}; give rule fixed.")
    made, wanted = graph.outputs[spec.output.name], 3 if spec.output.kind == "image" else 1
    if spec.output.kind == "mask" and len(made) == 3:
        return
    if len(made) != 4:
        raise CheckpointMismatch(f"{spec.name}: the output has {len(made)} axes; served are four, or three for a mask.")
    if axes(made, spec)[1] not in (None, wanted):
        raise CheckpointMismatch(
            f"{spec.name}: the output has {axes(made, spec)[1]} channels; of kind {spec.output.kind} it has {wanted}."
        )


def axes(shape: Shape, spec: Spec) -> Shape:
    """As (N, C, H, W)."""
    return shape if spec.input.layout == "NCHW" else (shape[0], shape[3], shape[1], shape[2])


def _shape(shape: Any) -> Shape:
    return tuple(side if isinstance(side, int) and side > 0 else None for side in shape)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
