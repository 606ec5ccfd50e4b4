"""The wheel holds the application alone, and works where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
# What else a checkout holds belongs to those who change it.
PACKAGES = {"deploy", "engine", "server", "training"}
SOURCES = (*PACKAGES, "ambidex.py", "pyproject.toml", "README.md", "LICENSE")
CODE = {".py", ".c", ".h"}
SHOWN = {".css", ".html", ".js", ".svg", ".jinja"}
PARTS_OF_A_CHECKPOINT = {".json", ".safetensors", ".md"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because setuptools leaves its build directory among the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / "source" / name, ignore=ignored)
        else:
            shutil.copy(source, folder / "source" / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source")
    (built,) = folder.glob("*.whl")
    return built


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--quiet", "--no-index"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_what_the_command_needs_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = [PurePosixPath(name) for name in archive.namelist()]
    installed = {file for file in files if not file.parts[0].endswith(".dist-info")}
    assert {file.parts[0] for file in installed} == PACKAGES | {"ambidex.py"}
    of_deploy = {file.parts[1] for file in installed if file.parts[0] == "deploy"}
    assert of_deploy == {"__init__.py", "ray"}
    by_suffix = {suffix: {f for f in installed if f.suffix == suffix} for suffix in CODE | SHOWN}
    assert all(by_suffix[suffix] for suffix in (".c", ".h", ".css", ".html", ".js"))
    for file in installed:
        checkpoint = file.parts[:2] == ("engine", "starter")
        assert file.suffix in (PARTS_OF_A_CHECKPOINT if checkpoint else CODE | SHOWN), file


def test_every_source_of_a_package_is_in_the_wheel(wheel: Path) -> None:
    """A folder without `__init__.py`, or a new kind of file, would be missing at run time alone."""
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    for package in PACKAGES - {"deploy"}:
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert path.relative_to(ROOT).as_posix() in inside


def test_the_installed_application_works_outside_of_a_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    pip("install", "--no-deps", "--target", target, wheel)
    environment = {**os.environ, "PYTHONPATH": str(target), "COLUMNS": "100"}

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        arguments = list(map(str, command))
        return subprocess.run(
            arguments, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    where = run(sys.executable, "-c", "import ambidex; print(ambidex.__file__)")
    assert where.stdout.strip() == str(target / "ambidex.py")
    explained = run(target / "bin" / "ambidex", "--help")
    assert explained.returncode == 0, explained.stderr
    for command in ("train", "import", "serve", "generate", "inspect"):
        assert f"│ {command} " in explained.stdout
    assert "bench" not in explained.stdout
    refused = run(target / "bin" / "ambidex", "bench", "ffn")
    assert refused.returncode == 1
    assert "from its repository" in " ".join(refused.stderr.split())
    server = run(sys.executable, "-m", "server", "--help")
    assert server.returncode == 0, server.stderr
    assert "--port" in server.stdout
    text = run(target / "bin" / "ambidex", "generate", "import os", "--max-new-tokens", "2")
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("import os")
