"""The arrows run one way, between packages and inside them, and no folder has too many doors.

Read from the imports: server -> engine <- training, deploy stands on server; inside a package, a
room imports only the rooms that its table names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = ("deploy", "engine", "server", "training")
FORBIDDEN = {
    "engine": {
        *("training", "server", "deploy", "benchmarks", "ambidex"),
        *("fastapi", "pydantic", "prometheus_client", "transformers", "ray"),
    },
    "training": {
        *("server", "deploy", "benchmarks", "ambidex"),
        *("fastapi", "pydantic", "transformers", "ray"),
    },
    "server": {"training", "deploy", "benchmarks", "ambidex", "ray"},
    "deploy": {"training", "benchmarks", "ambidex"},
}

# Rooms of each package, from the ground up, and the rooms that each may import besides itself.
# Whatever lies in no room (errors, config, ...) is open to all. A room is a folder or a file; one
# that is not there yet is no room.
ENGINE = {
    "model": set(),
    "cpu": {"model"},
    "gpu": {"model"},
    "text": set(),
    "serving": {"model", "cpu", "gpu", "text"},
}
GPU = {"routing": set(), "ffn": {"routing"}, "attention": set()}
SERVER = {
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
}
TRAINING = {
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
}
ROOMS: dict[str, dict[str, set[str]]] = {
    "server": SERVER,
    "training": TRAINING,
    "engine": ENGINE,
    "engine/gpu": GPU,
}

MOST_DOORS = 14
# Folders that are wider for now.
EXEMPT: set[str] = set()
NOT_DOORS = re.compile(r"__pycache__|__init__\.py|\..*|.*\.egg-info")

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
    return {name for name in imported_modules(path) if name.split(".")[0] in forbidden}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_upward_import(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    broken = {str(f): found for f in files if (found := upward(f, FORBIDDEN[package]))}
    assert not broken


def files_of(room: Path) -> Iterator[Path]:
    """The files of a room, which is a folder or one file."""
    if room.with_suffix(".py").is_file():
        yield room.with_suffix(".py")
    yield from sorted(room.rglob("*.py"))


def arrows(root: Path, package: str, rooms: dict[str, set[str]]) -> Iterator[tuple[Path, str]]:
    """Imports between rooms of `package` that their table does not allow."""
    prefix = package.replace("/", ".")
    for room, allowed in rooms.items():
        closed = {f"{prefix}.{other}" for other in rooms.keys() - allowed - {room}}
        for file in files_of(root / package / room):
            for name in imported_modules(file):
                if any(name == other or name.startswith(f"{other}.") for other in closed):
                    yield file, name


@pytest.mark.parametrize("package", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(package: str) -> None:
    assert not list(arrows(ROOT, package, ROOMS[package]))


@pytest.mark.parametrize("package", ROOMS)
def test_the_tables_of_rooms_have_no_circle(package: str) -> None:
    below: set[str] = set()
    waiting = dict(ROOMS[package])
    while waiting:
        ready = {room for room, allowed in waiting.items() if allowed <= below}
        assert ready, f"a circle among {sorted(waiting)}"
        below |= ready
        waiting = {room: allowed for room, allowed in waiting.items() if room not in ready}


def doors(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not NOT_DOORS.fullmatch(path.name))


def folders() -> list[str]:
    """Every folder of ours but those of records and of a checkpoint's files."""
    tops = (*PRODUCT, "benchmarks", "docs", "tests")
    found = {path.parent for top in tops for path in (ROOT / top).rglob("*") if path.is_file()}
    names = {path.relative_to(ROOT).as_posix() for path in found}
    names = {name for name in names if not any(map(NOT_DOORS.fullmatch, name.split("/")))}
    return sorted(names - {"benchmarks/results"})


@pytest.mark.parametrize("folder", folders())
def test_no_folder_has_too_many_doors(folder: str) -> None:
    found = doors(ROOT / folder)
    if folder not in EXEMPT:
        assert len(found) <= MOST_DOORS, found


def test_no_exemption_outlives_its_need() -> None:
    """One that is not needed any more would hide the next folder that grows."""
    needless = {
        folder
        for folder in EXEMPT
        if (ROOT / folder).is_dir() and len(doors(ROOT / folder)) <= MOST_DOORS
    }
    assert not needless


@pytest.mark.parametrize("file", TENSORLESS)
def test_bookkeeping_sees_no_tensor(file: str) -> None:
    roots = {name.split(".")[0] for name in imported_modules(ROOT / file)}
    assert not roots & {"torch", "numpy", "triton"}
    heavy = {"engine.model.decoder", "engine.serving.runner", "training.trainer"}
    assert not imported_modules(ROOT / file) & heavy


def test_the_check_itself_sees_an_upward_arrow(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from server import app\n    import training.data\n")
    assert upward(bad, FORBIDDEN["engine"]) == {"server", "server.app", "training.data"}


def test_the_check_itself_sees_an_arrow_between_rooms(tmp_path: Path) -> None:
    for room, line in (("model", "import engine.gpu.ffn"), ("gpu", "from engine import model")):
        (tmp_path / "engine" / room).mkdir(parents=True)
        (tmp_path / "engine" / room / "a.py").write_text(f"{line}\n")
    (tmp_path / "engine" / "text.py").write_text("from engine.errors import require\n")
    found = list(arrows(tmp_path, "engine", ENGINE))
    assert found == [(tmp_path / "engine/model/a.py", "engine.gpu.ffn")]
