"""The arrows between packages, and between the rooms of one, run one way; read from the imports.

Between packages: server -> engine <- training. Inside a package, `ROOMS` says which rooms a room
may import; a room is a folder of the package, or a module that stands beside the folders.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "engine": {
        *("training", "server", "deploy", "ambidex"),
        *("fastapi", "pydantic", "prometheus_client", "transformers", "ray"),
    },
    "engine/kernels": {"engine", "training", "server", "deploy"},
    "training": {"server", "deploy", "ambidex", "fastapi", "pydantic", "transformers", "ray"},
    "server": {"training", "deploy", "ambidex", "ray"},
    "deploy": {"training", "ambidex"},
}
# What each room of a package may import of the same package, besides itself.
ROOMS: dict[str, dict[str, set[str]]] = {
    "training": {
        "errors": set(),
        "config": set(),
        "presets": {"config"},
        "switching": {"config"},
        "step": {"config"},
        "data": {"config", "errors"},
        "parallel": {"errors", "step"},
        "experts": {"config", "data", "errors", "parallel"},
        "quality": {"data", "errors", "experts"},
        "run": {"config", "data", "errors", "experts", "parallel", "quality"},
        "report": {"errors", "experts", "run", "switching"},
        "importing": {"config", "data", "errors", "experts", "quality", "report", "run"},
        "trainer": {
            *("config", "data", "errors", "experts", "importing", "parallel", "quality", "report"),
            *("run", "step", "switching"),
        },
        "cli": {
            *("config", "data", "errors", "experts", "importing", "parallel", "presets", "quality"),
            *("report", "run", "trainer"),
        },
    },
}
MOST_DOORS = 14
# These decide and must not compute: tested in microseconds, without a tensor in sight.
TENSORLESS = [
    "engine/serving/scheduler.py",
    "engine/serving/kv_blocks.py",
    "engine/serving/request.py",
    "engine/config.py",
    "engine/serving/stats.py",
    "training/switching.py",
    "training/config.py",
]


def imported_modules(path: Path) -> set[str]:
    """Every module that the file imports, wherever the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def upward(path: Path, forbidden: set[str]) -> set[str]:
    return {
        name
        for name in imported_modules(path)
        if name.split(".")[0] in forbidden and not name.startswith("engine.kernels")
    }


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_upward_import(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    broken = {str(f): found for f in files if (found := upward(f, FORBIDDEN[package]))}
    assert not broken


def room_of(package: Path, path: Path) -> str:
    """The room of a file: the folder below the package, or the module itself."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def arrows(package: Path) -> dict[str, set[str]]:
    """The other rooms of `package` that each of its rooms imports."""
    rooms = {room_of(package, path) for path in package.rglob("*.py")} - {"__init__"}
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for path in package.rglob("*.py"):
        room = room_of(package, path)
        for name in imported_modules(path):
            parts = name.split(".")
            if parts[0] == package.name and len(parts) > 1 and parts[1] in rooms - {room}:
                found.setdefault(room, set()).add(parts[1])
    return found


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_only_what_the_table_allows(package: str) -> None:
    allowed = ROOMS[package]
    broken = {
        room: sorted(seen - allowed.get(room, set()))
        for room, seen in arrows(ROOT / package).items()
        if seen - allowed.get(room, set())
    }
    assert not broken


@pytest.mark.parametrize("package", ROOMS)
def test_the_table_of_rooms_has_no_circle(package: str) -> None:
    """Rooms can be taken away one after another, each when nothing that is left stands on it."""
    left = dict(ROOMS[package])
    while left:
        free = [room for room, below in left.items() if not below & left.keys()]
        assert free, f"these import each other in a circle: {sorted(left)}"
        for room in free:
            del left[room]


@pytest.mark.parametrize("package", ROOMS)
def test_modules_import_each_other_in_no_circle(package: str) -> None:
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in (ROOT / package).rglob("*.py")
    }
    left = {name: imported_modules(path) & files.keys() for name, path in files.items()}
    while left:
        free = [name for name, below in left.items() if not below & left.keys()]
        assert free, f"these import each other in a circle: {sorted(left)}"
        for name in free:
            del left[name]


@pytest.mark.parametrize("package", ROOMS)
def test_every_folder_has_few_doors(package: str) -> None:
    folders = [p for p in (ROOT / package).rglob("*") if p.is_dir() and p.name != "__pycache__"]
    for folder in [ROOT / package, *folders]:
        doors = {p.name for p in folder.iterdir()} - {"__init__.py", "__pycache__", "py.typed"}
        assert len(doors) <= MOST_DOORS, f"{folder.relative_to(ROOT)} has {len(doors)}"


def test_the_check_of_rooms_sees_an_arrow(tmp_path: Path) -> None:
    package = tmp_path / "training"
    for folder in ("data", "trainer"):
        (package / folder).mkdir(parents=True)
    (package / "data" / "text.py").write_text("def f():\n    from training.trainer import x\n")
    (package / "trainer" / "a.py").write_text(
        "import training.data.text\nimport training.trainer\n"
    )
    assert arrows(package) == {"data": {"trainer"}, "trainer": {"data"}}


@pytest.mark.parametrize("file", TENSORLESS)
def test_bookkeeping_sees_no_tensor(file: str) -> None:
    roots = {name.split(".")[0] for name in imported_modules(ROOT / file)}
    assert not roots & {"torch", "numpy", "triton"}
    heavy = {"engine.model", "engine.model.experts", "engine.serving.runner", "training.trainer"}
    assert not imported_modules(ROOT / file) & heavy


def test_the_check_itself_sees_an_upward_arrow(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from server import app\n    import training.data\n")
    assert upward(bad, FORBIDDEN["engine"]) == {"server", "server.app", "training.data"}
