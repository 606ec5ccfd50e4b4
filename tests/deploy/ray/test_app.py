"""The application's options, its file, and what is said where Ray is missing."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.ray.options import Options, warnings
from deploy.ray.wire import merged_metrics
from server.settings import Settings

DEPLOY = Path(__file__).parents[3] / "deploy" / "ray"
FILE = DEPLOY / "serve.yaml"


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("deploy.ray.app")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match="which the extra `ray` installs: pip install"):
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
        assert Options.of(application["args"]).max_replicas > 1
        assert application["import_path"] == "deploy.ray.app:build"
        names += application["runtime_env"]["env_vars"]
    assert len(names) >= 6
    for name in names:
        assert name.removeprefix("AMBIDEX_").lower() in Settings.model_fields


def test_kubernetes_has_what_the_pods_need() -> None:
    document = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())
    base = DEPLOY.parent / "kubernetes" / "base"
    namespace = yaml.safe_load((base / "namespace.yaml").read_text())["metadata"]["name"]
    claim = yaml.safe_load((base / "models.yaml").read_text())["metadata"]["name"]
    assert document["metadata"]["namespace"] == namespace
    cluster = document["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        assert [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]] == [
            claim
        ]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for part in (*pod["containers"], cluster["autoscalerOptions"]):
            confined = part["securityContext"]
            assert not confined["allowPrivilegeEscalation"]
            assert confined["capabilities"] == {"drop": ["ALL"]}
    (worker,) = workers["template"]["spec"]["containers"]
    port = yaml.safe_load(document["spec"]["serveConfigV2"])["http_options"]["port"]
    assert worker["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": port}


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


def test_what_is_seldom_meant_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys = Settings(api_keys="alice-0123456789abcdef")
    assert warnings(keys, {"AMBIDEX_WATCH": "/models"}) == []
    unknown, is_open = warnings(Settings(), {"AMBIDEX_WACTH": "/models"})
    assert "did you mean AMBIDEX_WATCH?" in unknown
    assert "without API keys" in is_open
    pytest.importorskip("ray")
    app = importlib.import_module("deploy.ray.app")
    monkeypatch.setenv("AMBIDEX_WACTH", "/models")
    app.build({})
    assert "AMBIDEX_WACTH is no setting" in caplog.text
    assert is_open in caplog.text


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
    merged = merged_metrics([("a", page), ("b", page.replace(b"1.0\n", b"7.0\n"))]).decode()
    lines = merged.splitlines()
    assert lines.count("# TYPE x_total counter") == lines.count("# TYPE y histogram") == 1
    assert 'x_total{layer="0",replica="a"} 1.0' in lines
    assert 'x_total{layer="0",replica="b"} 7.0' in lines
    assert 'y_bucket{le="+Inf",replica="b"} 3.0' in lines
    assert merged.index("y_sum") > merged.index('x_total{layer="0",replica="b"}')
