"""What a filter's TOML says, every key of it checked: which graph, how pixels go in, and what comes out (docs/filters.md)."""

from __future__ import annotations

import importlib.util
import os
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from retouch.edit import CheckpointMismatch, UnknownCheckpoint

BUNDLED = Path(__file__).parent

Layout = Literal["NCHW", "NHWC"]
Order = Literal["RGB", "BGR"]
Rule = Literal["any", "multiple", "fixed", "resize"]
Kind = Literal["image", "mask"]


@dataclass(frozen=True, slots=True)
class Weights:
    """`file` lies in the folder of an installed `package`, else beside the TOML. `install` is how to get it."""

    file: str
    package: str = ""
    install: str = ""


@dataclass(frozen=True, slots=True)
class Input:
    """Pixels 0 to 255 become `range`, then (x - `mean`) / `std` by channel, in `order`."""

    name: str
    layout: Layout = "NCHW"
    order: Order = "RGB"
    range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def check(self) -> str:
        return _one_of("layout", self.layout, Layout) or _one_of("order", self.order, Order) or _spread(self.range, self.std)


@dataclass(frozen=True, slots=True)
class Size:
    """Which sizes the graph takes.

    `any`; `multiple` of that many pixels; `fixed`: tiles of `side` (width, height); `resize`: the whole picture
    scaled to `side`. A picture with a side longer than `tile` (0: none is) is cut into tiles that share `overlap` pixels.
    """

    rule: Rule = "any"
    multiple: int = 1
    side: tuple[int, int] = (0, 0)
    tile: int = 0
    overlap: int = 16

    def check(self) -> str:
        if wrong := _one_of("rule", self.rule, Rule):
            return wrong
        if (self.rule in ("fixed", "resize")) != (self.side != (0, 0)) or min(self.side) < 0:
            return "side goes with the rules fixed and resize, and they need one: [width, height] in pixels"
        if (self.rule == "multiple") != (self.multiple != 1) or self.multiple < 1:
            return "multiple goes with the rule multiple, which needs one, above 1"
        if self.tile and (self.rule not in ("any", "multiple") or self.tile < 0 or self.tile % self.multiple):
            return "tile goes with the rules any and multiple, and is itself a multiple"
        shortest = min(self.side) if self.rule == "fixed" else self.tile
        if self.overlap < 0 or (shortest and 2 * self.overlap > shortest):
            return f"overlap is {self.overlap}; give 0 to half a tile's side"
        return ""


@dataclass(frozen=True, slots=True)
class Output:
    """`image`: three channels, `scale` times the input's sides; `mask`: one, which becomes the picture's transparency.

    `range` is what stands for black and white (clear and opaque); "stretch": from the lowest to the highest value of a picture.
    """

    name: str
    kind: Kind = "image"
    scale: int = 1
    range: tuple[float, float] | Literal["stretch"] = (0.0, 1.0)

    def check(self) -> str:
        if wrong := _one_of("kind", self.kind, Kind):
            return wrong
        if self.scale < 1 or (self.kind == "mask" and self.scale != 1):
            return f"scale is {self.scale}; give 1 or more, and 1 for a mask"
        return "" if self.range == "stretch" else _spread(self.range, ())


@dataclass(frozen=True, slots=True)
class Spec:
    """A filter.

    `constants` are what the graph's further inputs get, the same for every picture. `about` is one line for the list of
    filters, `source` says whose weights these are, under which licence.
    """

    name: str
    weights: Weights
    input: Input
    output: Output
    size: Size = field(default_factory=Size)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    about: str = ""
    source: str = ""


def bundled() -> dict[str, Path]:
    return {path.stem: path for path in sorted(BUNDLED.glob("*.toml"))}


def find(name: str) -> Path:
    """A bundled filter's TOML, or the path of another. Raises UnknownCheckpoint."""
    if name in bundled():
        return bundled()[name]
    path = Path(os.path.expanduser(name))  # os.path, as pathlib raises for what cannot be a path
    if path.suffix == ".toml" and os.path.isfile(path):
        return path
    raise UnknownCheckpoint(f"there is no filter {name!r}; give {', '.join(bundled())}, or the path of a .toml file.")


def read(path: Path) -> Spec:
    """Raises CheckpointMismatch for whatever is not as this page says."""
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CheckpointMismatch(f"{path} cannot be read as TOML: {error}.") from error
    parts: dict[str, Any] = {"weights": Weights, "input": Input, "size": Size, "output": Output}
    for name, kind in parts.items():
        if name in given:
            given[name] = _made(kind, given[name], f"{path}, [{name}]")
    constants = given.get("constants", {})
    if isinstance(constants, dict):  # else `_made` says what it should be
        given["constants"] = {name: _numbers(f"{path}, [constants], {name}", value) for name, value in constants.items()}
    spec: Spec = _made(Spec, {"name": path.stem, **given}, str(path))
    return spec


def weights_of(spec: Spec, path: Path) -> Path:
    """Where the filter's weights lie. Raises UnknownCheckpoint that says how to get them."""
    wanted = spec.weights
    mend = f"{wanted.install}" if wanted.install else "put it there, or mend [weights]"
    folder = path.parent
    if wanted.package:
        found = importlib.util.find_spec(wanted.package.split(".")[0])  # finds it without running any of it
        if found is None or not found.submodule_search_locations:
            raise UnknownCheckpoint(f"the weights of {spec.name} are in the package {wanted.package}, not installed: {mend}.")
        folder = Path(found.submodule_search_locations[0])
    if not os.path.isfile(folder / wanted.file):
        raise UnknownCheckpoint(f"the weights of {spec.name} are not there: no file {folder / wanted.file}; {mend}.")
    return folder / wanted.file


def _made(kind: Any, given: Any, where: str) -> Any:
    """A dataclass of the table that is given. Its annotations are texts, whose beginning says enough to check a TOML value."""
    if not isinstance(given, dict):
        raise CheckpointMismatch(f"{where} is {given!r}; give a table.")
    known = {f.name: str(f.type) for f in fields(kind)}
    if unknown := sorted(set(given) - set(known)):
        raise CheckpointMismatch(f"{where} has unknown keys {', '.join(unknown)}; known are {', '.join(known)}.")
    checked = {key: _value(f"{where}, {key}", value, known[key]) for key, value in given.items()}
    try:
        made = kind(**checked)
    except TypeError as error:
        missing = [name for name in ("name", "file", "weights", "input", "output") if name in known and name not in given]
        raise CheckpointMismatch(f"{where} lacks {', '.join(missing)}.") from error
    if wrong := made.check() if hasattr(made, "check") else "":
        raise CheckpointMismatch(f"{where}: {wrong}.")
    return made


def _value(where: str, value: Any, annotation: str) -> Any:
    if annotation.startswith("tuple"):
        if value == "stretch" and "stretch" in annotation:
            return value
        inner = annotation[: annotation.index("]")]
        number, count = (int if "int" in inner else float), inner.count(",") + 1
        numbers = isinstance(value, list) and all(isinstance(v, int | number) and not isinstance(v, bool) for v in value)
        if not numbers or len(value) != count:
            raise CheckpointMismatch(f"{where} is {value!r}; give a list of {count} numbers.")
        return tuple(map(number, value))
    wanted = {"int": int, "str": str, "Layout": str, "Order": str, "Rule": str, "Kind": str}.get(annotation)
    if wanted is not None and (not isinstance(value, wanted) or isinstance(value, bool)):
        raise CheckpointMismatch(f"{where} is {value!r}; give {'a whole number' if wanted is int else 'a text'}.")
    if wanted is None and isinstance(value, str | int | float | list):
        raise CheckpointMismatch(f"{where} is {value!r}; give a table.")
    return value


def _numbers(where: str, value: Any) -> np.ndarray:
    """A number, or lists of them as deep as the graph's input has axes, float32."""
    try:
        return np.array(value, np.float32)
    except (TypeError, ValueError) as error:
        raise CheckpointMismatch(f"{where} is {value!r}; give a number, or a list of them.") from error


def _one_of(name: str, value: str, kind: Any) -> str:
    return "" if value in get_args(kind) else f"{name} is {value!r}; give {' or '.join(get_args(kind))}"


def _spread(span: tuple[float, float], std: tuple[float, ...]) -> str:
    if not span[0] < span[1]:
        return f"range is {list(span)}; give the value of black, then a higher one of white"
    return "" if all(s > 0 for s in std) else f"std is {list(std)}; give numbers above 0"
