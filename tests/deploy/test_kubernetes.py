"""The Kubernetes manifests: valid for the API, confined, and true to the server and to each other.

Kubernetes' own objects are checked against the API's JSON schemas of the oldest and the newest
release that the package has and the manifests support, with no unknown field; those of the
Prometheus operator against models generated from its CRDs.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.prometheus_operator import v1 as operator

from deploy.kubernetes import prometheus_rule
from engine.kernels.native import build
from server.routes import ops
from server.security import HEALTH_PATHS, METRICS_PATHS
from server.serve import CLOSE_SECONDS
from server.settings import Settings
from tests.deploy.manifests import (
    DATA,
    KUBERNETES,
    SERVERS,
    TRAINING,
    Manifest,
    arguments,
    container,
    environment,
    one,
    pod,
    render,
    workload,
)
from tests.deploy.prometheus import BINARIES, WHY_SKIPPED
from training.presets import read_config

OLDEST = "1.30"  # preStop's sleep
RELEASES = (OLDEST, kubernetes_validate.latest_version())
ALL = (*SERVERS, *TRAINING, DATA)
KEY = "client:0123456789abcdef0123456789abcdef"
SECRETS = {"AMBIDEX_ADMIN_KEY": "abcdef0123456789", "AMBIDEX_NUM_THREADS": "2"}
OTHERS = {"OMP_NUM_THREADS": "2"}
ROUTES = {route.path for route in ops.router.routes}
README = (KUBERNETES / "README.md").read_text()
ADAPTER = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())
MINUTE = 60
both = pytest.mark.parametrize("overlay", SERVERS)
every = pytest.mark.parametrize("kustomization", ALL)


def promtool(*arguments: str | Path) -> None:
    if None in BINARIES:
        pytest.skip(WHY_SKIPPED)
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def rule_objects() -> list[Manifest]:
    return [m for m in render("overlays/cpu") if m["kind"] == "PrometheusRule"]


# The API


@pytest.mark.parametrize("release", RELEASES)
@every
def test_every_object_is_valid(kustomization: str, release: str) -> None:
    objects = [m for m in render(kustomization) if "coreos" not in m["apiVersion"]]
    assert len(objects) >= 3
    for manifest in objects:
        kubernetes_validate.validate(manifest, release, strict=True)


def test_the_rules_are_those_of_prometheus() -> None:
    """One source: the operator's objects have the groups of deploy/prometheus/rules."""
    assert prometheus_rule.FILE.read_text() == prometheus_rule.prometheus_rules(), (
        "run: make prometheus-rule"
    )
    files = sorted(prometheus_rule.RULES.glob("*.yml"))
    assert len(files) == len(rule_objects()) > 1
    for file, rules in zip(files, rule_objects(), strict=True):
        groups = rules["spec"]["groups"]
        assert groups == yaml.safe_load(file.read_text())["groups"], file.name
        assert len({group["name"] for group in groups}) == len(groups), "names are keys"


@both
def test_the_operators_objects_are_valid(overlay: str) -> None:
    objects = [m for m in render(overlay) if "coreos" in m["apiVersion"]]
    assert {m["kind"] for m in objects} == {"ServiceMonitor", "PrometheusRule"}
    for manifest in objects:
        model = getattr(operator, manifest["kind"]).model_validate(manifest)
        # The models pass over what they do not know; it would be missing here.
        assert model.model_dump(mode="json", by_alias=True, exclude_none=True) == manifest


def test_what_is_not_valid_is_found() -> None:
    deployment = {**workload("overlays/cpu"), "specs": {}}
    with pytest.raises(kubernetes_validate.ValidationError, match="specs"):
        kubernetes_validate.validate(deployment, OLDEST, strict=True)


def test_every_file_is_used() -> None:
    """No file lies beside a kustomization that does not name it."""
    paths = list(KUBERNETES.rglob("kustomization.yaml"))
    assert len(paths) == len(ALL) + 5
    for path in paths:
        content = yaml.safe_load(path.read_text())
        named = {*content.get("resources", ())} | {
            p.get("path") for p in content.get("patches", ())
        }
        named |= {f for g in content.get("configMapGenerator", ()) for f in g["files"]}
        files = {f.name for f in path.parent.iterdir() if f.is_file()} - {path.name}
        assert files <= named, path


# Confinement (the pod security standard "restricted", and a root that cannot be written to)


@every
def test_pods_are_confined(kustomization: str) -> None:
    spec = pod(kustomization)
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    user = spec["securityContext"]
    assert user["runAsNonRoot"] is True
    assert user["runAsUser"] == user["runAsGroup"] == user["fsGroup"] == 10001
    assert user["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(kustomization)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    assert all("hostPath" not in volume for volume in spec["volumes"])
    assert one("overlays/cpu", "ServiceAccount")["automountServiceAccountToken"] is False


@every
def test_the_namespace_is_one(kustomization: str) -> None:
    names = {m["metadata"].get("namespace") for m in render(kustomization)} - {None}
    namespace = one("overlays/cpu", "Namespace")
    assert names == {namespace["metadata"]["name"]}
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@every
def test_the_image_is_the_one_of_the_device(kustomization: str) -> None:
    tag, gpu = ("cuda", 1) if kustomization.endswith("gpu") else ("cpu", None)
    assert container(kustomization)["image"] == f"ambidex:{tag}"
    assert container(kustomization)["resources"]["limits"].get("nvidia.com/gpu") == gpu


# The server


@both
def test_every_variable_is_a_setting_with_a_value_in_its_range(
    overlay: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "api-keys").write_text(KEY)
    known = {f"AMBIDEX_{name.upper()}" for name in Settings.model_fields}
    given = environment(overlay, SECRETS)
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
    given = environment("overlays/cpu", SECRETS)
    path = given["AMBIDEX_CACHE"].replace("/cache", str(tmp_path), 1)
    monkeypatch.setenv("AMBIDEX_CACHE", path)
    assert str(build._cache_directory()) == path
    assert given["TRITON_CACHE_DIR"].startswith("/cache/")


@both
def test_probes_ask_routes_that_answer_without_a_key(overlay: str) -> None:
    server = container(overlay)
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    given = environment(overlay, SECRETS)
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
    drain = float(environment(overlay, SECRETS)["AMBIDEX_DRAIN_TIMEOUT"])
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
    named += [v for v in environment(kustomization, SECRETS | OTHERS).values() if v.startswith("/")]
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
    given = environment(overlay, SECRETS)
    assert given["AMBIDEX_API_KEYS_FILE"] == f"{mount['mountPath']}/{item['path']}"
    (admin,) = (v for v in container(overlay)["env"] if v["name"] == "AMBIDEX_ADMIN_KEY")
    assert admin["valueFrom"]["secretKeyRef"]["name"] == volume["secretName"]
    assert not any(m["kind"] == "Secret" for m in render(overlay)), "none is shipped"
    assert f"create secret generic {volume['secretName']}" in README
    assert all(f"--from-literal={key}=" in README for key in (item["key"], "admin-key"))


# Autoscaling; that the server exports what is asked for, test_training_job.py shows


def test_the_adapter_answers_with_each_pods_mean_over_a_minute(tmp_path: Path) -> None:
    """Its query, filled in as the adapter does, in a unit test of Prometheus's own."""
    (rule,) = ADAPTER["rules"]["custom"]
    assert rule["resources"]["overrides"].keys() == {"namespace", "pod"}
    filled = {
        "Series": "ambidex_requests_waiting",
        "LabelMatchers": 'namespace="ambidex",pod=~"a|b"',
        "GroupBy": "pod",
    }
    query = re.sub(r"<<\.(\w+)>>", lambda match: filled[match[1]], rule["metricsQuery"])
    series = 'ambidex_requests_waiting{{namespace="{}",pod="{}",instance="{}:8000"}}'
    values = {("ambidex", "a"): "0 4 8 8 8", ("ambidex", "b"): "0x4", ("other", "a"): "9x4"}
    case = {
        "interval": "15s",
        "input_series": [
            {"series": series.format(*labels, labels[1]), "values": found}
            for labels, found in values.items()
        ],
        "promql_expr_test": [
            {
                "expr": query,
                "eval_time": "1m",
                "exp_samples": [
                    {"labels": '{pod="a"}', "value": 5.6},
                    {"labels": '{pod="b"}', "value": 0},
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": [], "tests": [case]}))
    promtool("test", "rules", tmp_path / "test.yml")


def test_the_adapter_serves_what_the_autoscaler_asks_for() -> None:
    (rule,) = ADAPTER["rules"]["custom"]
    pattern = re.search(r'__name__=~"(.*?)"', rule["seriesQuery"])
    assert pattern is not None
    for overlay in SERVERS:
        metrics = one(overlay, "HorizontalPodAutoscaler")["spec"]["metrics"]
        for metric in metrics:
            assert re.fullmatch(pattern[1], metric["pods"]["metric"]["name"])


@both
def test_servers_are_added_before_they_are_full(overlay: str) -> None:
    metrics = one(overlay, "HorizontalPodAutoscaler")["spec"]["metrics"]
    at = {m["pods"]["metric"]["name"]: int(m["pods"]["target"]["averageValue"]) for m in metrics}
    given = environment(overlay, SECRETS)
    seqs = int(given.get("AMBIDEX_MAX_NUM_SEQS", Settings.model_fields["max_num_seqs"].default))
    waiting = Settings.model_fields["max_waiting"].default
    assert seqs / 2 < at["ambidex_requests_running"] < seqs
    assert 0 < at["ambidex_requests_waiting"] < waiting / 10


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
    watched = environment("overlays/cpu", SECRETS)["AMBIDEX_WATCH"]
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
    given = environment("training/gpu", OTHERS)
    grace = pod("training/gpu")["terminationGracePeriodSeconds"]
    assert 0 < int(given["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < grace
