"""The Dockerfile says what the documentation promises, and is read as Docker reads it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path, PurePosixPath

import pytest

from deploy.build_context import IgnoreRules, context_files
from deploy.dockerfile import PATH, Dockerfile, DockerfileError, Image, expand, instructions
from engine.cpu import build
from server.security import HEALTH_PATHS
from server.settings import Settings

ROOT = Path(__file__).parents[2]
TARGETS = ("cpu", "cuda")


@pytest.fixture(scope="module")
def dockerfile() -> Dockerfile:
    return Dockerfile.parse((ROOT / "Dockerfile").read_text(encoding="utf-8"))


@pytest.fixture(params=TARGETS)
def image(request: pytest.FixtureRequest, dockerfile: Dockerfile) -> Image:
    return dockerfile.image(request.param)


# What the images say


def test_the_last_stage_is_the_cpu_image(dockerfile: Dockerfile) -> None:
    """`docker build` without a target takes it."""
    assert dockerfile.stages[-1].name == "cpu"


def test_it_runs_as_a_fixed_user_without_privileges(image: Image) -> None:
    assert image.user == "10001:10001"
    assert image.workdir == "/models"
    assert set(image.volumes) == {"/models", "/cache"}
    assert image.ports == ("8000",)
    assert image.stop_signal == "SIGTERM"


def test_signals_reach_the_server(image: Image, dockerfile: Dockerfile) -> None:
    """Exec forms: no shell stands between the engine and process 1."""
    assert image.entrypoint == ("ambidex",)
    assert image.cmd == ("serve",)
    for step in (s for stage in dockerfile.stages for s in stage.steps):
        if step.name in ("CMD", "ENTRYPOINT"):
            assert step.exec_form() is not None
    assert image.healthcheck is not None
    assert image.healthcheck.exec_form() is not None


def test_every_setting_exists_and_is_accepted(
    image: Image, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours = {k: v for k, v in image.environment.items() if k.startswith("AMBIDEX_")}
    names = {k.removeprefix("AMBIDEX_").lower() for k in ours} - {"cache"}
    assert names <= Settings.model_fields.keys()
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.host == "0.0.0.0"
    assert settings.watch == Path("/models")
    assert settings.port == int(image.ports[0])


def test_what_is_compiled_is_kept_on_the_cache_volume(
    image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMBIDEX_CACHE", image.environment["AMBIDEX_CACHE"])
    caches = [str(build._wanted_directory()), image.environment["TRITON_CACHE_DIR"]]
    caches.append(image.environment["XDG_CACHE_HOME"])
    assert all(PurePosixPath(path).is_relative_to("/cache") for path in caches)


def test_the_cuda_image_uses_the_gpu(dockerfile: Dockerfile) -> None:
    assert dockerfile.image("cuda").environment["AMBIDEX_DEVICE"] == "cuda"
    assert "AMBIDEX_DEVICE" not in dockerfile.image("cpu").environment


def test_health_is_asked_where_no_key_is_needed(image: Image) -> None:
    assert image.healthcheck is not None
    interpreter, option, program = image.healthcheck.command()
    assert (interpreter, option) == ("python", "-c")
    compile(program, "healthcheck", "exec")
    assert re.findall(r"'(/[a-z/]+)'", program) == ["/health/live"]
    assert "/health/live" in HEALTH_PATHS
    assert set(re.findall(r"import (.*?);", program)) == {"http.client, os"}


def test_labels_have_the_version_of_the_package(image: Image) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    labels = {k.removeprefix("org.opencontainers.image."): v for k, v in image.labels.items()}
    assert labels["version"] == project["version"]
    assert labels["licenses"] == project["license"]
    assert labels["title"] == project["name"]
    assert labels["revision"] == "unknown"


def test_bases_and_libraries_are_pinned(dockerfile: Dockerfile) -> None:
    bases = {s.base for s in dockerfile.stages if not dockerfile.has(s.base)}
    assert len(bases) == 1
    assert re.fullmatch(r"debian:[a-z]+-\d{8}-slim", bases.pop())
    installs = [
        command
        for stage in dockerfile.stages
        for step in stage.steps
        if step.name == "RUN"
        for command in step.value.split("&&")
        if "pip install" in command and "--no-deps --root" not in command
    ]
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in command for command in installs)


def test_targets_need_only_their_own_libraries(dockerfile: Dockerfile) -> None:
    for target, other in (TARGETS, TARGETS[::-1]):
        needed = [stage.name for stage in dockerfile.needed(target)]
        assert needed[-1] == target
        assert f"libraries-{target}" in needed
        assert f"libraries-{other}" not in needed
        assert needed.index("application") < needed.index(target)


def test_the_context_is_what_the_wheel_is_made_of() -> None:
    seen = {str(path) for path in context_files(ROOT)}
    assert {"pyproject.toml", "constraints.txt", "ambidex.py", "LICENSE", "README.md"} <= seen
    assert "engine/starter/model.safetensors" in seen
    assert "engine/cpu/source/products.h" in seen
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    modules = tools["setuptools"]["py-modules"]
    assert {f"{module.replace('.', '/')}.py" for module in modules} <= seen
    top = {PurePosixPath(path).parts[0] for path in seen}
    assert not top & {".git", ".venv", ".ci", "tests", "docs", "runs", "Dockerfile"}
    assert not [p for p in seen if "__pycache__" in p or p.startswith("benchmarks/results/")]


# How it is read


def test_instructions_are_joined_and_comments_left_out() -> None:
    text = "# first\nFROM a AS b\n\nrun one \\\n  # within\n\n    && two \\\n    && three\n"
    first, second = instructions(text)
    assert (first.line, first.name, first.value) == (2, "FROM", "a AS b")
    assert (second.line, second.name) == (4, "RUN")
    assert second.value.split() == ["one", "&&", "two", "&&", "three"]


def test_flags_stand_before_the_value() -> None:
    (step,) = instructions("COPY --from=x --chown=1:2 --a /b/\n")
    assert step.flags == (("from", "x"), ("chown", "1:2"), ("a", ""))
    assert step.words() == ("/b/",)


def test_commands_have_two_forms() -> None:
    shell, listed = instructions('RUN echo "$A"\nRUN ["echo", "$A"]\n')
    assert shell.command() == ("/bin/sh", "-c", 'echo "$A"')
    assert listed.command() == ("echo", "$A")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$A-${A}b", "1-1b"),
        ("${NONE}", ""),
        ("${NONE:-x}${A:-x}", "x1"),
        ("${NONE:+x}${A:+x}", "x"),
        (r"\$A", "$A"),
        (r"a\b", r"a\b"),
    ],
)
def test_variables(text: str, expected: str) -> None:
    assert expand(text, {"A": "1"}) == expected


def test_a_stage_inherits_from_its_base_what_containers_see() -> None:
    text = """
        ARG BASE=debian
        FROM ${BASE} AS one
        ARG WHO=me
        ENV A="one two" B=${WHO}
        WORKDIR /x
        USER 5:6
        ENTRYPOINT ["p"]
        CMD ["q"]
        HEALTHCHECK --interval=1s CMD ["r"]
        FROM one AS two
        ENV C=$A PATH=/y:$PATH
        WORKDIR z
        ENTRYPOINT ["s"]
        HEALTHCHECK NONE
    """
    file = Dockerfile.parse(text, {"BASE": "other", "WHO": "you"})
    assert file.stages[0].base == "other"
    one, two = file.image("one"), file.image("two")
    assert (one.environment["A"], one.environment["B"]) == ("one two", "you")
    assert one.healthcheck is not None
    assert one.healthcheck.exec_form() == ("r",)
    assert one.healthcheck.flag("interval") == "1s"
    # A value with spaces must be quoted where it is used, too.
    assert two.environment["PATH"] == f"/y:{PATH}"
    assert (two.workdir, two.user) == ("/x/z", "5:6")
    assert (two.entrypoint, two.cmd) == (("s",), ())  # as Docker resets it
    assert two.healthcheck is None


def test_only_needed_stages_are_built() -> None:
    file = Dockerfile.parse(
        "FROM d AS a\nFROM d AS b\nFROM a AS c\nFROM b AS e\nCOPY --from=c /x /x\n"
    )
    assert [s.name for s in file.needed("e")] == ["a", "b", "c", "e"]
    assert [s.name for s in file.needed("b")] == ["b"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no FROM"),
        ("RUN x\n", "line 1: RUN stands before the first FROM"),
        ("FROM a b c d\n", "line 1: write FROM image"),
        ("FROM a\nADD x y\n", "line 2: ADD is not supported"),
        ("FROM a\nRUN <<EOF\n", "here-documents"),
        ("FROM a\nRUN x \\\n", "line 2: the file ends in a continued line"),
        ("FROM a\nUSER\n", "USER says nothing"),
        ("FROM a\nARG X\n", "needs a default"),
        ("FROM a\nHEALTHCHECK x\n", "write HEALTHCHECK CMD"),
    ],
)
def test_what_is_not_understood_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(DockerfileError, match=complaint):
        Dockerfile.parse(text).image("0")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(DockerfileError, match="no ARG is named B"):
        Dockerfile.parse("FROM x\nARG A=1\n", {"B": "1"})
    with pytest.raises(DockerfileError, match="there is no stage 'y', only x"):
        Dockerfile.parse("FROM d AS x\n").needed("y")


# .dockerignore


@pytest.mark.parametrize(
    ("patterns", "path", "excluded"),
    [
        ("", "a", False),
        ("a", "a", True),
        ("a", "a/b", True),
        ("a", "b/a", False),
        ("/a/", "a/b", True),
        ("*.txt", "a.txt", True),
        ("*.txt", "d/a.txt", False),
        ("**/*.txt", "d/e/a.txt", True),
        ("**/*.txt", "a.txt", True),
        ("d/**", "d/e/f", True),
        ("a?c", "abc", True),
        ("a[0-9]", "a7", True),
        ("a[0-9]", "ab", False),
        (r"a\*", "a*", True),
        (r"a\*", "ab", False),
        ("a.c", "abc", False),
        ("*\n!a", "a/b", False),
        ("*\n!a\na/b", "a/b", True),
        ("*\n!a/b", "a/c", True),
        ("*\n!a/b", "a/b", False),
        ("# a", "a", False),
    ],
)
def test_ignore_patterns(patterns: str, path: str, excluded: bool) -> None:
    assert IgnoreRules.parse(patterns).excludes(PurePosixPath(path)) is excluded


def test_an_exception_is_found_in_an_excluded_directory(tmp_path: Path) -> None:
    (tmp_path / ".dockerignore").write_text("*\n!keep/this\n")
    for name in ("keep/this", "keep/that", "other"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to("keep")
    assert [str(path) for path in context_files(tmp_path)] == ["keep/this"]
