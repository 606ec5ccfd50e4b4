"""The application's options, its file, and what is said where Ray is missing."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.ray.exposition import merge
from deploy.ray.options import Options
from server.settings import Settings

DEPLOY = Path(__file__).parents[3] / "deploy" / "ray"
FILE = DEPLOY / "serve.yaml"


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("deploy.ray.app")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'ambidex\[ray\]'"):
        importlib.import_module("deploy.ray.app")


def serve_files() -> list[dict[str, Any]]:
    """What both files tell Serve."""
    on_kubernetes = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())
    return [
        yaml.safe_load(FILE.read_text()),
        yaml.safe_load(on_kubernetes["spec"]["serveConfigV2"]),
    ]


def test_the_files_mean_what_there_is() -> None:
    names = [line.split("#")[1].split(":")[0].strip() for line in _commented(FILE)]
    for document in serve_files():
        (application,) = document["applications"]
        assert Options.of(application["args"]).min_replicas == 2
        assert application["import_path"] == "deploy.ray.app:build"
        names += application["runtime_env"]["env_vars"]
    assert len(names) >= 6
    for name in names:
        assert name.removeprefix("AMBIDEX_").lower() in Settings.model_fields


def _commented(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if "# AMBIDEX_" in line]


def test_serve_accepts_the_files() -> None:
    schema = pytest.importorskip("ray.serve.schema")
    for document in serve_files():
        assert schema.ServeDeploySchema.model_validate(document)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"min_replicas": 3}, "max_replicas 1 must be at least min_replicas 3"),
        ({"min_replicas": 0}, "min_replicas: Input should be greater than or equal to 1"),
        ({"load_bound": 1}, "load_bound: Input should be greater than 1"),
        ({"replicas": 2}, "replicas: Extra inputs are not permitted"),
        ({"cpus": "many"}, "cpus: Input should be a valid number"),
    ],
)
def test_options_that_cannot_be_used(args: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Options.of(args)


def test_options_may_be_texts() -> None:
    assert Options.of({"min_replicas": "2", "max_replicas": "4"}).max_replicas == 4


def test_pages_become_one_page() -> None:
    page = b"""# HELP x_total What.
# TYPE x_total counter
x_total{layer="0"} 1.0
# HELP y Other.
# TYPE y histogram
y_bucket{le="1.0"} 2.0
y_bucket{le="+Inf"} 3.0
y_count 3.0
y_sum 4.5
"""
    merged = merge([("a", page), ("b", page.replace(b"1.0\n", b"7.0\n"))]).decode()
    lines = merged.splitlines()
    assert lines.count("# TYPE x_total counter") == lines.count("# TYPE y histogram") == 1
    assert 'x_total{layer="0",replica="a"} 1.0' in lines
    assert 'x_total{layer="0",replica="b"} 7.0' in lines
    assert 'y_bucket{le="+Inf",replica="b"} 3.0' in lines
    assert merged.index("y_sum") > merged.index('x_total{layer="0",replica="b"}')
