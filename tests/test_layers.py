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
    "training": {"server", "deploy", "ambidex", "fastapi", "pydantic", "transformers", "ray"},
    "server": {"training", "deploy", "ambidex", "ray"},
    "deploy": {"training", "ambidex"},
}
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


@pytest.mark.parametrize("file", TENSORLESS)
def test_bookkeeping_sees_no_tensor(file: str) -> None:
    roots = {name.split(".")[0] for name in imported_modules(ROOT / file)}
    assert not roots & {"torch", "numpy", "triton"}
    heavy = {
        "engine.model.decoder",
        "engine.model.experts",
        "engine.serving.runner",
        "training.trainer",
    }
    assert not imported_modules(ROOT / file) & heavy


def test_the_check_itself_sees_an_upward_arrow(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from server import app\n    import training.data\n")
    assert upward(bad, FORBIDDEN["engine"]) == {"server", "server.app", "training.data"}
