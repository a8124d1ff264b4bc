"""Graphs in ncnn's format (a .param of text, a .bin of weights), by torch: those layers that super-resolution networks have.

Source: ncnn's `docs/developer-guide/operators.md` and `param-and-model-file-structure.md` (github.com/Tencent/ncnn).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retouch.edit import CheckpointMismatch

MAGIC = "7767517"
HALF, WHOLE = 0x01306B47, 0
"""What stands before weights in 16 and in 32 bits."""

Layer = Callable[..., Tensor]


class Ncnn:
    """The layers in the order of their lines. No value is read twice: ncnn writes a Split where one is needed again."""

    def __init__(self, path: Path) -> None:
        self.path, weights = path, path.with_suffix(".bin")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            lines, data = path.read_text().split("\n"), weights.read_bytes()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointMismatch(f"{path} or {weights.name} cannot be read: {error}.") from error
        self.inputs: dict[str, tuple[int | None, ...]] = {}
        self.layers: list[tuple[Layer | None, list[str], list[str]]] = []
        self._data, self._at = data, 0
        try:
            if lines[0].strip() != MAGIC:
                raise ValueError("the first line is not ncnn's")
            for line in filter(str.strip, lines[2:]):
                self._read(line.split())
            if len(data) != self._at:
                raise ValueError(f"{len(data) - self._at} bytes are left over")
        except (ValueError, IndexError, KeyError) as error:
            raise CheckpointMismatch(f"{path} and {weights.name} are damaged or no ncnn graph: {error}.") from error
        del self._data
        read = {name for _, names, _ in self.layers for name in names}
        made = [name for _, _, names in self.layers for name in names]
        self.outputs: dict[str, tuple[int | None, ...]] = {name: (None,) * 4 for name in made if name not in read}

    @torch.inference_mode()
    def run(self, x: np.ndarray) -> np.ndarray:
        """(N, C, H, W) to the last layer's, float32."""
        values = {name: torch.from_numpy(x).to(self.device, memory_format=torch.channels_last) for name in self.inputs}
        for layer, names, made in self.layers:
            given = [values.pop(name) for name in names]
            out = given[0] if layer is None else layer(*given)
            values |= dict.fromkeys(made, out)
        return next(iter(values.values())).float().cpu().numpy()

    def _read(self, words: list[str]) -> None:
        kind, name, read, made = words[0], words[1], int(words[2]), int(words[3])
        names, results = words[4 : 4 + read], words[4 + read : 4 + read + made]
        options = dict(word.split("=") for word in words[4 + read + made :])
        if kind == "Input":
            self.inputs |= dict.fromkeys(results, (None,) * 4)
        elif kind == "Split":
            self.layers.append((None, names, results))
        elif make := LAYERS.get(kind):
            self.layers.append((make(self, {int(k): v for k, v in options.items()}), names, results))
        else:
            raise ValueError(f"layer {name} is a {kind}; known are {', '.join(LAYERS)}")

    def _take(self, count: int, tagged: bool = False) -> Tensor:
        """So many numbers of the .bin; where they are `tagged`, four bytes before them say how wide they are."""
        width = "<f4"
        if tagged:
            tag = int.from_bytes(self._data[self._at : self._at + 4], "little")
            if tag not in (HALF, WHOLE):
                raise ValueError(f"weights in a form {tag:#x} that is not known")
            width, self._at = ("<f2" if tag == HALF else "<f4"), self._at + 4
        values = np.frombuffer(self._data, width, count, self._at)
        self._at += -(-values.nbytes // 4) * 4
        return torch.from_numpy(values.astype(np.float32)).to(self.device)


def _convolution(graph: Ncnn, options: dict[int, str]) -> Layer:
    if set(options) - {0, 1, 2, 3, 4, 5, 6, 9, -23310} or options.get(9, "0") not in ("0", "2"):
        raise ValueError("a convolution has options that are not known")
    made, side, count = int(options[0]), int(options[1]), int(options[6])
    weight = graph._take(count, tagged=True).view(made, count // (made * side * side), side, side)
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = graph._take(made) if options.get(5) == "1" else None
    dilation, stride, pad = int(options.get(2, "1")), int(options.get(3, "1")), int(options.get(4, "0"))
    slope = float(options[-23310].split(",")[1]) if options.get(9) == "2" else None

    def layer(x: Tensor) -> Tensor:
        out = F.conv2d(x, weight, bias, stride, pad, dilation)
        return out if slope is None else F.leaky_relu(out, slope, inplace=True)

    return layer


def _prelu(graph: Ncnn, options: dict[int, str]) -> Layer:
    slope = graph._take(int(options[0]))
    return lambda x: F.prelu(x, slope)


def _concat(graph: Ncnn, options: dict[int, str]) -> Layer:
    if options.get(0, "0") != "0":
        raise ValueError("a Concat along another axis than channels")
    return lambda *x: torch.cat(x, 1)


def _eltwise(graph: Ncnn, options: dict[int, str]) -> Layer:
    if options.get(0) != "1":
        raise ValueError("an Eltwise that is no sum")
    factors = [float(f) for f in options.get(-23301, "2,1,1").split(",")[1:]]
    return lambda a, b: torch.add(a * factors[0], b, alpha=factors[1])


def _binary(graph: Ncnn, options: dict[int, str]) -> Layer:
    if options.get(0, "0") != "0":
        raise ValueError("a BinaryOp that is no sum")
    return lambda a, b: a + b


def _interp(graph: Ncnn, options: dict[int, str]) -> Layer:
    if options.get(0) != "1":
        raise ValueError("an Interp that is not nearest")
    factors = (float(options[1]), float(options[2]))
    return lambda x: F.interpolate(x, scale_factor=factors, mode="nearest")


def _shuffle(graph: Ncnn, options: dict[int, str]) -> Layer:
    return lambda x: F.pixel_shuffle(x, int(options[0]))


LAYERS: dict[str, Callable[[Ncnn, dict[int, str]], Layer]] = {
    "Convolution": _convolution, "PReLU": _prelu, "Concat": _concat, "Eltwise": _eltwise, "BinaryOp": _binary,
    "Interp": _interp, "PixelShuffle": _shuffle,
}  # fmt: skip
