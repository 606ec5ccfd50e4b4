"""What the Dockerfile says, as far as it can be read without building it (check.py builds it)."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from engine.cpu import build
from server.http.security import HEALTH_PATHS
from server.settings import Settings
from tests.image.check import PROMISED, pip_volumes

ROOT = Path(__file__).parents[2]


def read_stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage in order, by the stage's name; comments are left out."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.M)
    stages: dict[str, list[tuple[str, str]]] = {"": []}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        name, _, value = line.partition(" ")
        if name == "FROM":
            stages[value.split()[-1]] = []
        if name:
            list(stages.values())[-1].append((name, value))
    return stages


STAGES = read_stages()
STEPS = [step for steps in STAGES.values() for step in steps]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def values(stage: str, instruction: str) -> list[str]:
    return [value for name, value in STAGES[stage] if name == instruction]


def environment(*stages: str) -> dict[str, str]:
    lines = [value for stage in stages for value in values(stage, "ENV")]
    words = [word for line in lines for word in shlex.split(line)]
    return dict(word.split("=", 1) for word in words)


def test_the_last_stage_is_the_cpu_image() -> None:
    """`docker build` without a target takes it."""
    assert list(STAGES)[-1] == "cpu"
    assert values("cpu", "FROM") == ["runtime AS cpu"]
    assert values("cuda", "FROM") == ["runtime AS cuda"]


def test_both_images_run_as_a_fixed_user_without_privileges() -> None:
    assert values("runtime", "USER") == ["10001:10001"]
    assert values("cuda", "USER") == ["root", "10001:10001"]
    assert values("cpu", "USER") == []


def test_the_check_of_the_built_image_asks_for_what_the_stage_says() -> None:
    said = dict(STAGES["runtime"])
    assert said["USER"] == PROMISED["User"]
    assert said["WORKDIR"] == PROMISED["WorkingDir"]
    assert {path: {} for path in json.loads(said["VOLUME"])} == PROMISED["Volumes"]
    assert {f"{said['EXPOSE']}/tcp": {}} == PROMISED["ExposedPorts"]
    assert said["STOPSIGNAL"] == PROMISED["StopSignal"]


def test_signals_reach_the_server() -> None:
    """Lists of words: no shell stands between the engine and process 1."""
    assert json.loads(values("runtime", "ENTRYPOINT")[0]) == PROMISED["Entrypoint"]
    assert json.loads(values("runtime", "CMD")[0]) == PROMISED["Cmd"]
    assert [name for name, _ in STEPS].count("ENTRYPOINT") == 1
    assert [name for name, _ in STEPS].count("CMD") == 1


def test_every_setting_exists_and_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    said = environment("runtime", "cuda")
    ours = {k: v for k, v in said.items() if k.startswith("AMBIDEX_")}
    names = {k.removeprefix("AMBIDEX_").lower() for k in ours} - {"cache"}
    assert names <= Settings.model_fields.keys()
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.host == "0.0.0.0"
    assert settings.watch == Path("/models")
    assert [str(settings.port)] == values("runtime", "EXPOSE")


def test_what_is_compiled_is_kept_on_the_cache_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    said = environment("runtime", "cuda")
    monkeypatch.setenv("AMBIDEX_CACHE", said["AMBIDEX_CACHE"])
    caches = [str(build._wanted_directory())]
    caches += [said[name] for name in ("TRITON_CACHE_DIR", "XDG_CACHE_HOME", "CUDA_CACHE_PATH")]
    assert all(PurePosixPath(path).is_relative_to("/cache") for path in caches)


def test_only_the_cuda_image_asks_for_the_gpu() -> None:
    assert environment("cuda")["AMBIDEX_DEVICE"] == "cuda"
    assert "AMBIDEX_DEVICE" not in environment("runtime", "cpu")


def test_health_is_asked_where_no_key_is_needed() -> None:
    _, _, command = values("runtime", "HEALTHCHECK")[0].partition(" CMD ")
    interpreter, option, program = json.loads(command)
    assert (interpreter, option) == ("python", "-c")
    compile(program, "healthcheck", "exec")
    assert re.findall(r"'(/[a-z/]+)'", program) == ["/health/live"]
    assert "/health/live" in HEALTH_PATHS
    assert set(re.findall(r"import (.*?);", program)) == {"http.client, os"}


def test_labels_have_the_version_of_the_package() -> None:
    (version,) = (v for v in values("runtime", "ARG") if v.startswith("VERSION="))
    assert version == f"VERSION={PROJECT['project']['version']}"
    labels = dict(word.split("=", 1) for word in shlex.split(values("runtime", "LABEL")[0]))
    assert labels["org.opencontainers.image.version"] == "${VERSION}"
    assert labels["org.opencontainers.image.licenses"] == PROJECT["project"]["license"]
    assert labels["org.opencontainers.image.title"] == PROJECT["project"]["name"]


def test_bases_and_libraries_are_pinned() -> None:
    (base,) = values("", "ARG")
    assert re.fullmatch(r"DEBIAN=debian:[a-z]+-\d{8}-slim", base)
    bases = {value.split()[0] for name, value in STEPS if name == "FROM"}
    assert bases - STAGES.keys() == {"${DEBIAN}"}
    commands = [c for name, value in STEPS if name == "RUN" for c in value.split("&&")]
    installs = [c for c in commands if "pip install" in c and "--no-deps --root" not in c]
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in command for command in installs)


@pytest.mark.parametrize(("target", "other"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_targets_copy_only_their_own_libraries(target: str, other: str) -> None:
    copied = " ".join(values(target, "COPY"))
    assert f"--from=libraries-{target} " in copied
    assert f"libraries-{other}" not in copied


# What a build sees: .dockerignore excludes everything, and brings some of it back.

IGNORED = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
PATTERNS = [line for line in IGNORED if line and not line.startswith("#")]
SEEN = [pattern[1:] for pattern in PATTERNS if pattern.startswith("!")]


def test_a_build_sees_nothing_but_what_is_listed() -> None:
    assert PATTERNS[0] == "*"
    assert PATTERNS.index(f"!{SEEN[-1]}") < PATTERNS.index("**/__pycache__")
    top = {pattern.split("/")[0] for pattern in SEEN}
    assert not top & {".git", ".venv", ".ci", "tests", "docs", "runs", "Dockerfile"}
    missing = [pattern for pattern in SEEN if not list(ROOT.glob(pattern))]
    assert not missing


def test_a_build_sees_what_the_wheel_is_made_of() -> None:
    tools = PROJECT["tool"]["setuptools"]
    packages = {name.rstrip("*").split(".")[0] for name in tools["packages"]["find"]["include"]}
    files = {f"{name}.py" for name in tools["py-modules"]}
    files |= {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert packages | files <= {pattern.split("/")[0] for pattern in SEEN}


def test_what_is_copied_from_the_checkout_is_seen() -> None:
    copies = [value.split() for name, value in STEPS if name == "COPY" and "--from=" not in value]
    sources = [source for *sources, _ in copies for source in sources]
    assert set(sources) == {"pyproject.toml", "constraints.txt", "."}
    assert set(sources) - {"."} <= set(SEEN)


def test_what_is_copied_from_a_stage_comes_from_one_above() -> None:
    for stage, above in zip(STAGES, ([*STAGES][:i] for i in range(len(STAGES))), strict=True):
        for value in values(stage, "COPY"):
            origin = re.match(r"--from=(\S+)", value)
            assert origin is None or origin[1] in above


# What the check does before it builds.


def test_pip_settings_hold_in_a_build(tmp_path: Path) -> None:
    wheels, index, certificate = (tmp_path / name for name in ("wheels", "pypi/simple", "ca.crt"))
    wheels.mkdir()
    index.mkdir(parents=True)
    certificate.touch()
    config = {
        "cert": str(certificate),
        "extra-index-url": f"https://example.org/simple\nfile://{index}",
        "find-links": str(wheels),
        "timeout": "60",
    }
    volumes = pip_volumes(tmp_path, config)
    assert (tmp_path / "pip.conf").read_text().splitlines() == [
        "[global]",
        f"cert = /mnt{certificate}",
        f"extra-index-url = https://example.org/simple file:///mnt{index}",
        f"find-links = /mnt{wheels}",
        "timeout = 60",
    ]
    assert set(volumes) == {
        f"--volume={tmp_path}/pip.conf:/etc/pip.conf:ro",
        *(f"--volume={path}:/mnt{path}:ro" for path in (certificate, index.parent, wheels)),
    }
