"""What `kubectl kustomize` makes of deploy/kubernetes, and how to find one's way in it."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

KUBERNETES = Path(__file__).parents[3] / "deploy" / "kubernetes"
Manifest = dict[str, Any]

SERVERS = ("overlays/cpu", "overlays/gpu")
TRAINING = ("training/cpu", "training/gpu")
DATA = "training/data"
ALL = (*SERVERS, *TRAINING, DATA)

# What variables are that come from elsewhere: the Secret, and the container's own resources.
REFERENCES = {
    "AMBIDEX_ADMIN_KEY": "0123456789abcdef" * 2,
    "AMBIDEX_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}


@functools.cache
def render(kustomization: str) -> tuple[Manifest, ...]:
    """The objects of one kustomization; skips where kubectl is not installed, but not in CI."""
    kubectl = shutil.which("kubectl")
    if kubectl is None and not os.environ.get("CI"):
        pytest.skip("kubectl is not installed")
    assert kubectl is not None, "kubectl must be installed in CI"
    rendered = subprocess.run(
        [kubectl, "kustomize", str(KUBERNETES / kustomization)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert rendered.returncode == 0, rendered.stderr
    assert "Warning" not in rendered.stderr, rendered.stderr
    return tuple(yaml.safe_load_all(rendered.stdout))


def one(kustomization: str, kind: str) -> Manifest:
    """The only object of its kind."""
    (found,) = (m for m in render(kustomization) if m["kind"] == kind)
    return found


def rule_objects() -> list[Manifest]:
    return [m for m in render("overlays/cpu") if m["kind"] == "PrometheusRule"]


def workload(kustomization: str) -> Manifest:
    """The Deployment or the Job."""
    return one(kustomization, "Deployment" if kustomization in SERVERS else "Job")


def pod(kustomization: str) -> Manifest:
    """The pod's specification in it, or the pod's own."""
    if kustomization == DATA:
        return one(kustomization, "Pod")["spec"]
    return workload(kustomization)["spec"]["template"]["spec"]


def container(kustomization: str) -> Manifest:
    (found,) = pod(kustomization)["containers"]
    return found


def environment(kustomization: str) -> dict[str, str]:
    """The container's variables."""
    found = {}
    for variable in container(kustomization)["env"]:
        name = variable["name"]
        found[name] = variable["value"] if "value" in variable else REFERENCES[name]
    return found


def arguments(kustomization: str) -> list[str]:
    """The container's arguments, $(NAME) replaced by its variable as Kubernetes does."""
    plain = {v["name"]: v["value"] for v in container(kustomization)["env"] if "value" in v}
    return [
        re.sub(r"\$\((\w+)\)", lambda match: plain[match[1]], argument)
        for argument in container(kustomization)["args"]
    ]


class Volumes:
    """Directories in the place of a pod's volumes; pods that name the same claim share one."""

    def __init__(self, root: Path, secrets: dict[str, str], configuration: str) -> None:
        """`secrets` are the files of every Secret, `configuration` replaces run.toml."""
        self.root = root
        self.secrets = secrets
        self.configuration = configuration

    def mounts(self, kustomization: str) -> dict[str, Path]:
        """The directory behind each path of the container."""
        volumes = {volume["name"]: volume for volume in pod(kustomization)["volumes"]}
        return {
            mount["mountPath"]: self._directory(kustomization, volumes[mount["name"]])
            for mount in container(kustomization)["volumeMounts"]
        }

    def _directory(self, kustomization: str, volume: Manifest) -> Path:
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        path = self.root / (claim or f"{kustomization}/{volume['name']}")
        path.mkdir(parents=True, exist_ok=True)
        if "secret" in volume:
            for name, content in self.secrets.items():
                (path / name).write_text(content)
        if "configMap" in volume:
            (path / "run.toml").write_text(self.configuration)
        return path

    def substitute(self, kustomization: str, text: str) -> str:
        """`text` with the container's paths replaced."""
        mounts = self.mounts(kustomization)
        paths = "|".join(map(re.escape, sorted(mounts, key=len, reverse=True)))
        pattern = rf"(?<![\w/])({paths})(?![\w-])"
        return re.sub(pattern, lambda match: str(mounts[match[1]]), text)

    def log(self, kustomization: str) -> Path:
        """What the container's process has written."""
        return self.root / f"{kustomization.replace('/', '-')}.log"

    def start(self, kustomization: str, **changed: str) -> subprocess.Popen[bytes]:
        """Run the container's command on this machine: `ambidex` is the image's entry point."""
        assert "command" not in container(kustomization)
        variables = environment(kustomization)
        given = {name: self.substitute(kustomization, v) for name, v in variables.items()}
        command = [self.substitute(kustomization, word) for word in arguments(kustomization)]
        with self.log(kustomization).open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "ambidex", *command],
                env={**os.environ, "PYTHONPATH": str(KUBERNETES.parents[1]), **given, **changed},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
