"""Who is measured: the rungs of Retouch, from the plain pipeline up, and the peers of a TOML file. Each is a server."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from retouch.edit import InvalidOption
from retouch.engine.savings import SAVINGS
from retouch.measure.endpoint import EXTENSIONS

PEERS = Path(__file__).resolve().parents[3] / "bench" / "peers" / "peers.toml"
KINDS = ("full", "crop", "other")
"""Of peers: those that compute the whole picture, those that compute a crop around the mask, and what is neither."""

RUNG, AGAIN = "rung", "again"
FIELDS = ("name", "environment", "command", "kind", "concurrency", "send")
SENDS = ("seed", "num_inference_steps")
"""What is sent beside OpenAI's fields: the same to everybody, else it is not the same edit."""

SENDABLE = tuple(sorted(EXTENSIONS - {"documents"}))
"""What a peer can be sent: not the name of an upload, since an answer is held against the file that went with it."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A server to be started by `command`, in `folder`, with `--port N`; `concurrency` requests are sent at once.

    `role`: a rung, the last rung measured again, or one of KINDS. `step` is a rung's place on the ladder. `needs` is a file
    without which it cannot be started.
    """

    name: str
    role: str
    command: tuple[str, ...]
    concurrency: int
    sends: tuple[str, ...] = SENDS
    folder: Path | None = None
    step: int = 0
    needs: Path | None = None

    @property
    def ours(self) -> bool:
        return self.role in (RUNG, AGAIN)


@dataclass(frozen=True, slots=True)
class Rung:
    """`cause` is what it saves by against the rung before it; `savings` and what else `options` says go to `retouch serve`."""

    name: str
    cause: str
    savings: tuple[str, ...]
    options: tuple[str, ...] = ()


LADDER = (
    Rung("plain", "", ()),
    Rung("+ document cache", "document cache", ("documents",)),
    Rung("+ masked tokens", "masked tokens", ("documents", "mask")),
    Rung("+ prompt cache", "prompt cache", ("documents", "mask", "prompts")),
    Rung("+ packing", "packing", SAVINGS),
    Rung("+ compile", "compile", SAVINGS, ("--compile",)),
    Rung("+ context of 64 px", "context", SAVINGS, ("--compile", "--context", "64")),
)


@dataclass(frozen=True, slots=True)
class Common:
    """What all are started with. `model` is a directory or a name that `retouch serve` takes."""

    model: str
    dtype: str
    threads: int
    clients: int

    def options(self) -> tuple[str, ...]:
        return ("--model", self.model, "--dtype", self.dtype)


def rungs(common: Common) -> list[Subject]:
    """The ladder, and its last rung again."""
    serve = (sys.executable, "-m", "retouch.cli", "serve", "--ledger", "none", "--queue", "100000", *common.options())
    made = []
    for step, rung in enumerate(LADDER):
        switches = ("--savings", ",".join(rung.savings) or "none", *rung.options)
        made.append(Subject(rung.name, RUNG, (*serve, *switches), common.clients, (*SENDS, "use_cache"), step=step))
    return [*made, replace(made[-1], name=again_of(made[-1].name), role=AGAIN)]


def again_of(name: str) -> str:
    """The name of a rung's second measurement."""
    return f"{name}, again"


def peers(path: Path, common: Common) -> list[Subject]:
    """Of the [[peer]] tables of a file. Raises InvalidOption, which names the file and what to mend."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidOption(f"{path} cannot be read ({error}); give a TOML file of [[peer]] tables.") from error
    rows = content.get("peer")
    if set(content) != {"peer"} or not isinstance(rows, list) or not rows:
        raise InvalidOption(f"{path} has to hold [[peer]] tables, and nothing else; see docs/bench.md.")
    made = [_peer(path.resolve().parent, f"{path}, peer {number}", row, common) for number, row in enumerate(rows, 1)]
    twice = {one.name for one in made if sum(other.name == one.name for other in made) > 1}
    if twice:
        raise InvalidOption(f"{path} has two peers of the name {min(twice)!r}; give each its own.")
    return made


def _peer(folder: Path, where: str, row: Any, common: Common) -> Subject:
    if not isinstance(row, dict):
        raise InvalidOption(f"{where} is {row!r}; give a [[peer]] table with {', '.join(FIELDS)}.")
    if unknown := sorted(set(row) - set(FIELDS)):
        raise InvalidOption(f"{where} has the unknown field {unknown[0]!r}; known are {', '.join(FIELDS)}.")
    name, environment, kind = row.get("name"), row.get("environment", ""), row.get("kind")
    command, concurrency, send = row.get("command"), row.get("concurrency", 1), row.get("send", list(SENDS))
    if not isinstance(name, str) or not name.strip() or not isinstance(environment, str):
        raise InvalidOption(f"{where} has no name, or an environment that is no text; give both as text.")
    if not isinstance(command, list) or not command or not all(isinstance(part, str) for part in command):
        raise InvalidOption(f'{where}: command is {command!r}; give what Python is to run, such as ["lock.py", "--fast"].')
    if kind not in KINDS:
        raise InvalidOption(f"{where}: kind is {kind!r}; give {', '.join(KINDS)}.")
    if isinstance(concurrency, bool) or not isinstance(concurrency, int) or not 1 <= concurrency <= 1000:
        raise InvalidOption(f"{where}: concurrency is {concurrency!r}; give how many requests are sent at once.")
    if not isinstance(send, list) or not set(map(str, send)) <= set(SENDABLE):
        raise InvalidOption(f"{where}: send is {send!r}; give a list of these, or []: {', '.join(SENDABLE)}.")
    python = folder / ".venvs" / environment / "bin" / "python" if environment else Path(sys.executable)
    whole = (str(python), *command, *common.options(), "--threads", str(common.threads))
    return Subject(name, kind, whole, concurrency, tuple(send), folder, needs=python)


def named(text: str, subjects: Sequence[Subject]) -> tuple[str, ...]:
    """The names in a text, between commas. Parts that together are a name as it stands, commas and all, or that fit one only
    together, are one.
    """
    parts, found = text.split(","), []
    while parts:
        count = next((count for count in range(len(parts), 1, -1) if _together(parts[:count], subjects)), 1)
        found.append(",".join(parts[:count]).strip())
        parts = parts[count:]
    return tuple(name for name in found if name)


def _together(parts: Sequence[str], subjects: Sequence[Subject]) -> bool:
    whole = ",".join(parts).strip()
    if any(one.name.lower() == whole.lower() for one in subjects if one.role != AGAIN):
        return True
    alone = all(any(_fits(one, [part.strip()]) for one in subjects) for part in parts)
    return not alone and any(_fits(one, [whole]) for one in subjects)


def chosen(subjects: Sequence[Subject], only: Sequence[str], skip: Sequence[str]) -> list[Subject]:
    """Those whose names, or roles, fit one of `only`, where it says any, and none of `skip`; * and ? are any letters. A rung's
    second measurement goes with the rung. Raises InvalidOption where a name fits nobody.
    """
    for option, patterns in (("--only", only), ("--skip", skip)):
        for pattern in patterns:
            if not any(_fits(one, [pattern]) for one in subjects):
                names = ", ".join(one.name for one in subjects if one.role != AGAIN)
                raise InvalidOption(f"{option} {pattern!r} fits nobody; there are {names}. * stands for any letters.")
    found = [one for one in subjects if (not only or _fits(one, only)) and not _fits(one, skip)]
    if not found:
        raise InvalidOption("nobody is left to be measured; ask for fewer --skip.")
    return found


def _fits(subject: Subject, patterns: Sequence[str]) -> bool:
    again = subject.role == AGAIN
    name, role = (subject.name.removesuffix(", again"), RUNG) if again else (subject.name, subject.role)
    return any(fnmatchcase(name.lower(), pattern.lower()) or pattern == role for pattern in patterns)


def spread(rungs: Sequence[Subject], peers: Sequence[Subject]) -> list[Subject]:
    """Peers between the rungs, evenly, so that a machine that gets slower or faster is no cause of a difference between them.

    The first rung stays first, since the others' pictures are held against its own, and the second measurement of the last
    rung stays last.
    """
    if not rungs or not peers:
        return [*rungs, *peers]
    placed = [(index / max(1, len(rungs) - 1), 0, one) for index, one in enumerate(rungs)]
    placed += [((index + 0.5) / len(peers), 1, one) for index, one in enumerate(peers)]
    return [one for _, _, one in sorted(placed, key=lambda place: place[:2])]
