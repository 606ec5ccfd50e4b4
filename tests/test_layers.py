"""The arrows between packages run one way: server -> engine <- training, read from the imports."""

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
# The rooms of a package (its folders and its own files), and which others each may import.
ROOMS: dict[str, dict[str, set[str]]] = {
    "server": {
        "errors": set(),
        "playground": set(),
        "schemas": {"errors"},
        "http": {"errors", "schemas"},
        "settings": {"http", "playground"},
        "engines": {"settings"},
        "metrics": {"engines", "settings"},
        "generation": {"engines", "errors", "http", "metrics", "settings"},
        "routes": {"generation", "http", "playground", "schemas"},
        "app": {"generation", "http", "routes", "schemas", "settings"},
        "process": {"app", "engines", "generation", "http", "settings"},
        "cli": {"process", "settings"},
        "__main__": {"cli", "process", "settings"},
    },
}
MOST_ENTRIES = 14  # that a folder of these packages, or of their tests, may have
# These decide and must not compute: tested in microseconds, without a tensor in sight.
TENSORLESS = [
    "engine/scheduler.py",
    "engine/kv_blocks.py",
    "engine/request.py",
    "engine/config.py",
    "engine/stats.py",
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


@pytest.mark.parametrize("file", TENSORLESS)
def test_bookkeeping_sees_no_tensor(file: str) -> None:
    roots = {name.split(".")[0] for name in imported_modules(ROOT / file)}
    assert not roots & {"torch", "numpy", "triton"}
    heavy = {"engine.model", "engine.experts", "engine.runner", "training.trainer"}
    assert not imported_modules(ROOT / file) & heavy


def test_the_check_itself_sees_an_upward_arrow(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from server import app\n    import training.data\n")
    assert upward(bad, FORBIDDEN["engine"]) == {"server", "server.app", "training.data"}


def imports_between_rooms(package: str) -> dict[str, set[str]]:
    """Which rooms of `package` each of its rooms imports."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / package).rglob("*.py"):
        if path == ROOT / package / "__init__.py":
            assert not imported_modules(path) - {"__future__", "__future__.annotations"}
            continue
        room = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        inside = (name.split(".") for name in imported_modules(path))
        others = {parts[1] for parts in inside if parts[0] == package and len(parts) > 1}
        found[room] = found.get(room, set()) | others - {room}
    return found


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_what_lies_below_them(package: str) -> None:
    allowed, order = ROOMS[package], list(ROOMS[package])
    for room, below in allowed.items():
        assert below <= set(order[: order.index(room)]), f"{room} is listed above what it needs"
    found = imports_between_rooms(package)
    assert found.keys() == allowed.keys()
    broken = {room: up for room in found if (up := found[room] - allowed[room])}
    assert not broken


@pytest.mark.parametrize("package", ROOMS)
def test_folders_show_few_entries(package: str) -> None:
    for top in (ROOT / package, ROOT / "tests" / package):
        for folder in (top, *(path for path in top.rglob("*") if path.is_dir())):
            shown = [path for path in folder.iterdir() if path.name != "__pycache__"]
            assert len(shown) <= MOST_ENTRIES, folder
