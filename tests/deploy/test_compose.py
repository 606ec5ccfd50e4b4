"""The composition keeps its promises: nothing open but loopback, nothing writable but volumes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import Settings

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
GPU: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert int(service["user"].split(":")[0]) > 0
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert "inside" in service["networks"]
    assert "healthcheck" in service or name == "server"  # its image has one


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_exists_and_is_read_only(name: str) -> None:
    for volume in SERVICES[name]["volumes"]:
        source, _, mode = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).partition(":")
        if source.startswith("."):
            assert mode.endswith(":ro"), volume
            assert source == "../models" or (DEPLOY / source).is_dir(), volume
        else:
            assert source in COMPOSE["volumes"]


def test_images_are_pinned_and_the_server_is_built_here() -> None:
    for name in ("prometheus", "grafana"):
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])
    assert SERVICES["server"]["build"] == {"context": "..", "target": "cpu"}
    assert GPU["services"]["server"]["build"] == {"target": "cuda"}
    assert GPU["services"]["server"]["image"] == "ambidex:cuda"


def test_secrets_are_files_that_the_services_read() -> None:
    assert all(secret["file"].startswith("./secrets/") for secret in COMPOSE["secrets"].values())
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if value == f"${{{name}:-}}":  # the caller's, or nothing
                continue
            assert not re.search("KEY|PASSWORD", name) or value.startswith("/run/secrets/"), name
            if isinstance(value, str) and value.startswith("/run/secrets/"):
                assert value.removeprefix("/run/secrets/") in service["secrets"]
    ignored = (DEPLOY.parent / ".gitignore").read_text().splitlines()
    assert {"/deploy/secrets/", "/models/"} <= set(ignored)


@pytest.mark.parametrize("document", [COMPOSE, GPU], ids=["cpu", "gpu"])
def test_the_server_accepts_its_settings(
    document: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = tmp_path / "api_keys"
    keys.write_text("0123456789abcdef0123456789abcdef\n")
    for name, value in document["services"]["server"]["environment"].items():
        assert name.removeprefix("AMBIDEX_").lower() in Settings.model_fields
        value = "" if value == f"${{{name}:-}}" else str(value)
        monkeypatch.setenv(name, str(keys) if name.endswith("_FILE") else value)
    settings = Settings()
    assert settings.admin_key is None  # until the caller sets one
    grace = SERVICES["server"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > settings.drain_timeout


def test_prometheus_scrapes_what_is_composed() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    targets = {job["job_name"]: job["static_configs"] for job in config["scrape_configs"]}
    assert targets["ambidex"] == [{"targets": ["server:8000"]}]
    folder = DEPLOY / "grafana" / "provisioning" / "datasources"
    (source,) = yaml.safe_load((folder / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
