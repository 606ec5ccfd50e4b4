"""The Kubernetes manifests are true to the server, to the trainer, and to each other."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

from engine.cpu import build
from server.http.security import HEALTH_PATHS, METRICS_PATHS
from server.process.serve import CLOSE_SECONDS
from server.routes import ops
from server.settings import Settings
from tests.deploy.kubernetes.manifests import (
    ALL,
    KUBERNETES,
    SERVERS,
    TRAINING,
    arguments,
    container,
    environment,
    one,
    pod,
    render,
    rule_objects,
    workload,
)
from training.presets import read_config

KEY = "client:0123456789abcdef0123456789abcdef"
ROUTES = {route.path for route in ops.router.routes if isinstance(route, APIRoute)}
README = (KUBERNETES / "README.md").read_text()
MINUTE = 60
both = pytest.mark.parametrize("overlay", SERVERS)
every = pytest.mark.parametrize("kustomization", ALL)


# The server


@both
def test_every_variable_is_a_setting_with_a_value_in_its_range(
    overlay: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "api-keys").write_text(KEY)
    known = {f"AMBIDEX_{name.upper()}" for name in Settings.model_fields}
    given = environment(overlay)
    ours = {name: value for name, value in given.items() if name.startswith("AMBIDEX_")}
    assert ours.keys() - known == {"AMBIDEX_CACHE"}
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AMBIDEX_API_KEYS_FILE", str(tmp_path / "api-keys"))
    settings = Settings()
    assert settings.keyring().keys
    assert settings.device == ("cuda" if overlay.endswith("gpu") else "cpu")
    assert str(settings.watch) == "/models"


def test_the_cache_is_what_the_kernels_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a directory of a volume that a group may write to, as /cache is."""
    tmp_path.chmod(0o2777)
    given = environment("overlays/cpu")
    path = given["AMBIDEX_CACHE"].replace("/cache", str(tmp_path), 1)
    monkeypatch.setenv("AMBIDEX_CACHE", path)
    assert str(build._cache_directory()) == path
    assert given["TRITON_CACHE_DIR"].startswith("/cache/")


@both
def test_probes_ask_routes_that_answer_without_a_key(overlay: str) -> None:
    server = container(overlay)
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    given = environment(overlay)
    asked = {
        name: server[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")
    }
    assert {name: request["path"] for name, request in asked.items()} == {
        "startup": "/health/ready",
        "readiness": "/health/ready",
        "liveness": "/health/live",
    }
    for request in asked.values():
        assert request["path"] in ROUTES & HEALTH_PATHS
        assert ports[request["port"]] == int(given["AMBIDEX_PORT"]) == 8000
    assert given["AMBIDEX_HOST"] == "0.0.0.0"


@both
def test_starting_may_take_as_long_as_it_does(overlay: str) -> None:
    """Loading and compiling: a quarter of an hour, and the rollout waits for it."""
    probe = container(overlay)["startupProbe"]
    startup = probe["periodSeconds"] * probe["failureThreshold"]
    assert startup >= 15 * MINUTE
    assert workload(overlay)["spec"]["progressDeadlineSeconds"] > startup


@both
def test_a_server_has_time_to_end_what_it_accepted(overlay: str) -> None:
    """Withdrawn from the Service, drained, closed: all of it before it is killed."""
    server = container(overlay)
    withdrawn = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = float(environment(overlay)["AMBIDEX_DRAIN_TIMEOUT"])
    grace = pod(overlay)["terminationGracePeriodSeconds"]
    assert withdrawn >= 10
    assert grace >= withdrawn + drain + CLOSE_SECONDS + 30
    rules = [r for o in rule_objects() for g in o["spec"]["groups"] for r in g["rules"]]
    (alert,) = (rule for rule in rules if rule.get("alert") == "AmbidexNotReady")
    patience = MINUTE * float(alert["for"].removesuffix("m"))
    assert drain < patience, "draining is no reason to wake somebody up"
    down = one(overlay, "HorizontalPodAutoscaler")["spec"]["behavior"]["scaleDown"]
    assert all(policy["periodSeconds"] >= grace for policy in down["policies"])


@both
def test_no_update_takes_a_server_before_another_serves(overlay: str) -> None:
    strategy = workload(overlay)["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxUnavailable": 0, "maxSurge": 1}
    budget = one(overlay, "PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] < one(overlay, "HorizontalPodAutoscaler")["spec"]["minReplicas"]


# What must say the same in several places


@both
def test_everything_selects_the_servers(overlay: str) -> None:
    deployment = workload(overlay)
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        one(overlay, "Service")["spec"]["selector"],
        one(overlay, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one(overlay, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        *(s["labelSelector"]["matchLabels"] for s in pod(overlay)["topologySpreadConstraints"]),
    ]
    assert all(selector == labels for selector in selectors)
    monitor = one(overlay, "ServiceMonitor")["spec"]
    service = one(overlay, "Service")
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "ambidex"
    scaled = one(overlay, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (scaled["kind"], scaled["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert "replicas" not in deployment["spec"], "they are the autoscaler's"


@both
def test_no_policy_of_training_meets_a_server(overlay: str) -> None:
    training = one("training/cpu", "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    assert training == workload("training/cpu")["spec"]["template"]["metadata"]["labels"]
    assert training != workload(overlay)["spec"]["template"]["metadata"]["labels"]


@both
def test_ports_lead_to_the_container(overlay: str) -> None:
    names = {port["name"] for port in container(overlay)["ports"]}
    (port,) = one(overlay, "Service")["spec"]["ports"]
    assert port["targetPort"] in names
    (endpoint,) = one(overlay, "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["port"] == port["name"]
    assert endpoint["path"] in ROUTES & METRICS_PATHS
    (rule,) = one(overlay, "NetworkPolicy")["spec"]["ingress"]
    assert {p["port"] for p in rule["ports"]} <= names


@every
def test_every_volume_is_mounted_and_exists(kustomization: str) -> None:
    spec, mounts = pod(kustomization), container(kustomization)["volumeMounts"]
    assert sorted(v["name"] for v in spec["volumes"]) == sorted(m["name"] for m in mounts)
    assert len({m["mountPath"] for m in mounts}) == len(mounts)
    objects = [*render("overlays/cpu"), *render(kustomization)]
    names = {(m["kind"], m["metadata"]["name"]) for m in objects}
    for volume in spec["volumes"]:
        if "persistentVolumeClaim" in volume:
            assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names
        elif "configMap" in volume:
            assert ("ConfigMap", volume["configMap"]["name"]) in names
        else:
            assert {"emptyDir", "secret"} & volume.keys()


@pytest.mark.parametrize("kustomization", [*SERVERS, *TRAINING])
def test_paths_lie_on_volumes(kustomization: str) -> None:
    """The root cannot be written to, so every path that is named must be a mount's."""
    mounts = {
        m["mountPath"]: m.get("readOnly", False) for m in container(kustomization)["volumeMounts"]
    }
    named = [p for a in arguments(kustomization) for p in re.findall(r"/[\w/.-]+", a)]
    named += [v for v in environment(kustomization).values() if v.startswith("/")]
    assert named
    for path in named:
        assert any(path == mount or path.startswith(f"{mount}/") for mount in mounts), path
    assert "/tmp" in mounts
    assert mounts["/models"] is (kustomization in SERVERS), "training writes, servers read"


@both
def test_keys_come_from_one_secret(overlay: str) -> None:
    (volume,) = (v["secret"] for v in pod(overlay)["volumes"] if "secret" in v)
    (mount,) = (m for m in container(overlay)["volumeMounts"] if m["name"] == "keys")
    (item,) = volume["items"]
    given = environment(overlay)
    assert given["AMBIDEX_API_KEYS_FILE"] == f"{mount['mountPath']}/{item['path']}"
    (admin,) = (v for v in container(overlay)["env"] if v["name"] == "AMBIDEX_ADMIN_KEY")
    assert admin["valueFrom"]["secretKeyRef"]["name"] == volume["secretName"]
    assert not any(m["kind"] == "Secret" for m in render(overlay)), "none is shipped"
    assert f"create secret generic {volume['secretName']}" in README
    assert all(f"--from-literal={key}=" in README for key in (item["key"], "admin-key"))


def test_the_patches_of_the_readme_apply(tmp_path: Path) -> None:
    """All of them, in the overlay of one's own that it shows."""
    overlay, *patches = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    place = os.path.relpath(KUBERNETES, tmp_path.resolve())
    text = "".join((overlay, *patches)).replace("../ambidex/deploy/kubernetes", place)
    (tmp_path / "kustomization.yaml").write_text(text)
    own = str(tmp_path)
    spec = one(own, "PersistentVolumeClaim")["spec"]
    assert spec["accessModes"] == ["ReadWriteOnce"]
    assert spec["storageClassName"] == "shared"
    seen = [m for m in render(own) if m["kind"] in ("ServiceMonitor", "PrometheusRule")]
    assert len(seen) >= 2
    assert all(m["metadata"]["labels"]["release"] == "monitoring" for m in seen)


# Training


@pytest.mark.parametrize("kustomization", TRAINING)
def test_the_job_trains_a_configuration_that_exists(kustomization: str) -> None:
    config = read_config(KUBERNETES / kustomization / "run.toml")
    data = one(kustomization, "ConfigMap")["data"]
    assert data["run.toml"] == (KUBERNETES / kustomization / "run.toml").read_text()
    assert config.preset == ("gpt-124m" if kustomization.endswith("gpu") else "gpt-5m")
    assert ("--device=cuda" in arguments(kustomization)) is kustomization.endswith("gpu")
    assert config.batch_size % 8 == 0, "up to eight GPUs share it evenly"


@pytest.mark.parametrize("kustomization", TRAINING)
def test_the_job_publishes_where_servers_watch(kustomization: str) -> None:
    watched = environment("overlays/cpu")["AMBIDEX_WATCH"]
    (target,) = (a for a in arguments(kustomization) if a.startswith("--publish="))
    assert target.rpartition("/")[0] == f"--publish={watched}", "a directory in the watched one"


@pytest.mark.parametrize("kustomization", TRAINING)
def test_an_eviction_costs_the_run_no_try(kustomization: str) -> None:
    spec = workload(kustomization)["spec"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule == {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    assert spec["podReplacementPolicy"] == "Failed"
    assert pod(kustomization)["restartPolicy"] == "Never"
    assert pod(kustomization)["terminationGracePeriodSeconds"] >= 5 * MINUTE


def test_torchrun_ends_before_the_pod_is_killed() -> None:
    given = environment("training/gpu")
    grace = pod("training/gpu")["terminationGracePeriodSeconds"]
    assert 0 < int(given["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < grace
