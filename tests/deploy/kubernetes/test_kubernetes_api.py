"""The Kubernetes manifests are valid for the API, and their pods confined.

Kubernetes' own objects are checked against the API's JSON schemas of the oldest and the newest
release that the package has and the manifests support, with no unknown field; those of the
Prometheus operator against models generated from its CRDs.
"""

from __future__ import annotations

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.prometheus_operator import v1 as operator

from deploy.kubernetes import prometheus_rule
from tests.deploy.kubernetes.manifests import (
    ALL,
    KUBERNETES,
    SERVERS,
    container,
    one,
    pod,
    render,
    rule_objects,
    workload,
)

OLDEST = "1.30"  # preStop's sleep
RELEASES = (OLDEST, kubernetes_validate.latest_version())
both = pytest.mark.parametrize("overlay", SERVERS)
every = pytest.mark.parametrize("kustomization", ALL)


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
