"""Holds the table of rooms and floors: who may import whom (downward only), and what `import retouch` may cost."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "retouch"

FLOORS = {
    **dict.fromkeys(["edit", "picture", "boxes", "composite", "pixels", "png"], 0),
    **dict.fromkeys(["config", "recipe", "record", "prices", "ledger", "trace"], 0),
    **dict.fromkeys(["kernels", "cache"], 1),
    "models": 2,
    **dict.fromkeys(["train", "passes"], 3),
    "engine": 4,
    **dict.fromkeys(["measure", "serve"], 5),
    **dict.fromkeys(["cli", "demo", "__main__"], 6),
}
DIFFUSERS = {"models", "train"}
"""Rooms that may import diffusers: models/ is the one that knows it, train/ builds and saves its classes."""

NO_TORCH = (
    {"edit", "picture", "boxes", "composite", "pixels", "png", "config", "recipe", "record", "prices", "engine/scheduler"}
    | {f"ledger/{name}" for name in ("__init__", "spared", "store", "sums", "tables", "writer")}
    | {f"trace/{name}" for name in ("__init__", "fields", "format", "shape")}
)
HEAVY = ("torch", "ray", "fastapi", "diffusers", "transformers")


def room_of(path):
    """src/retouch/models/flux2.py -> models; src/retouch/edit.py -> edit."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported_names(path):
    """Every absolute name a file imports, wherever in the file; under TYPE_CHECKING too, as a wall is a wall."""
    package = ["retouch", *path.relative_to(SOURCE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def rooms_imported(path):
    for name in imported_names(path):
        parts = name.split(".")
        if parts[0] == "retouch":
            # `from retouch import Edit` and `import retouch` enter through the front door, the package itself.
            yield parts[1] if len(parts) > 1 and parts[1] in FLOORS else "__init__"


def may_import(room, other):
    if room == other:
        return True
    if other == "__init__":
        return FLOORS[room] == 6
    return FLOORS[other] < FLOORS[room] or FLOORS[room] == FLOORS[other] == 0


FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_downward(path):
    room = room_of(path)
    assert room in FLOORS, f"{room} has no floor; give it one in FLOORS and in docs/design.md"
    wrong = sorted({other for other in rooms_imported(path) if not may_import(room, other)})
    assert not wrong, f"{room} (floor {FLOORS[room]}) imports {wrong}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_only_models_and_train_know_diffusers(path):
    tops = {name.split(".")[0] for name in imported_names(path)}
    assert "diffusers" not in tops or room_of(path) in DIFFUSERS
    if path.relative_to(SOURCE).with_suffix("").as_posix() in NO_TORCH:
        assert not tops & set(HEAVY)


def test_the_walls_stand_where_the_table_says():
    assert not may_import("measure", "serve")
    assert not may_import("serve", "measure")
    assert not may_import("models", "engine")
    assert not may_import("passes", "train")
    assert may_import("serve", "record")
    assert may_import("cli", "__init__")
    assert not may_import("engine", "__init__")


def test_import_retouch_stays_light():
    code = f"import sys, retouch; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_server_beside_its_worker_needs_no_torch():
    code = "import sys, retouch.serve.app; print([name for name in ('torch', 'diffusers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_retouch_takes_less_than_300_ms():
    """Of processor time: what else the machine does is not its fault."""
    code = "import time; start = time.process_time(); import retouch; print(time.process_time() - start)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    assert min(float(run.stdout) for run in runs) < 0.3


def test_the_commands_of_the_readme_exist():
    commands = set(re.findall(r"^make ([\w-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= commands <= targets
    assert {"lint", "bench"} <= targets


def test_the_photos_are_those_of_the_attribution():
    from PIL import Image

    photos = {path.name for path in (ROOT / "photos").glob("*.jpg")}
    listed = re.findall(r"^\| `([\w-]+\.jpg)`", (ROOT / "photos" / "ATTRIBUTION.md").read_text(), re.MULTILINE)
    assert sorted(photos) == sorted(listed)
    assert len(photos) == 20
    for name in photos:
        size = Image.open(ROOT / "photos" / name).size
        assert max(size) <= 512
        assert size[0] % 16 == size[1] % 16 == 0
