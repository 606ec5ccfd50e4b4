"""What `make image-check` does around the build, as far as it needs neither root nor a network."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deploy import host, image_check
from deploy.dockerfile import Dockerfile, DockerfileError, Image
from deploy.host import Mirrors, PipSettings
from deploy.image_build import Builder
from deploy.image_run import Container, Server
from deploy.rootfs import Account, RootError, container, copy_into, inside, run, size

ME = (os.getuid(), os.getgid())


def test_pip_settings_hold_inside(tmp_path: Path) -> None:
    wheels, index = tmp_path / "wheels", tmp_path / "index" / "simple"
    certificate = tmp_path / "ca.crt"
    wheels.mkdir()
    index.mkdir(parents=True)
    certificate.touch()
    listing = f"""
:env:.cert='{certificate}'
:env:.config-file='/nowhere'
global.cert='/also/nowhere'
global.extra-index-url='https://example.org/simple file://{index}'
global.find-links='{wheels}'
install.no-compile='true'
list.format='columns'
"""
    settings = PipSettings.parse(listing)
    assert settings.environment == {
        "PIP_CERT": "/mnt/0-ca.crt",
        "PIP_EXTRA_INDEX_URL": f"https://example.org/simple file://{index}",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_NO_COMPILE": "true",
    }
    assert settings.files == {"0-ca.crt": certificate}
    assert set(settings.folders) == {wheels, index.parent}


def test_sources_are_those_of_the_official_image() -> None:
    text = Mirrors("http://a/debian", "http://b/security").sources("bookworm")
    assert text.splitlines() == [
        "deb http://a/debian bookworm main",
        "deb http://a/debian bookworm-updates main",
        "deb http://b/security bookworm-security main",
    ]


def test_a_host_without_apt_builds_from_debian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert Mirrors.of_host("bookworm") == Mirrors(host.DEBIAN, host.SECURITY)
    assert host.missing_tools() == ["debootstrap", "mount", "unshare"]


def test_accounts_come_from_the_image(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("root:x:0:0:r:/root:/bin/sh\nme:x:5:6::/home/me:/x\n")
    assert Account.find(tmp_path, "me") == Account(5, 6, "/home/me")
    assert Account.find(tmp_path, "5:7") == Account(5, 7, "/home/me")
    assert Account.find(tmp_path, "99") == Account(99, 0, "/")
    with pytest.raises(RootError, match="USER you: there is no such user"):
        Account.find(tmp_path, "you")


def test_directories_are_copied_into_each_other(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "d").mkdir(parents=True)
    (source / "d/run").write_text("new")
    (source / "d/run").chmod(0o755)
    (source / "link").symlink_to("d/run")
    (target / "d").mkdir(parents=True)
    (target / "d/run").write_text("old")
    (target / "d/kept").write_text("kept")
    copy_into(source, target, ME)
    assert (target / "d/run").read_text() == "new"
    assert stat.S_IMODE((target / "d/run").stat().st_mode) == 0o755
    assert (target / "d/kept").read_text() == "kept"
    assert (target / "link").readlink() == Path("d/run")
    assert inside(target, "/d/run") == target / "d/run"
    os.link(target / "d/kept", target / "again")
    assert size(target) == len("new") + len("kept") + len("d/run")


def test_a_command_that_fails_says_its_last_words() -> None:
    with pytest.raises(RootError, match="no such luck"):
        run(["sh", "-c", "echo no such luck >&2; exit 3"])


def test_what_runs_is_process_one_of_its_own_and_sees_no_host_variables(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    call = container(tmp_path, ["p", "q"], Account(5, 6, "/h"), "/w", {"A": "1"})
    assert call["env"] == {"HOME": "/h", "A": "1"}
    words = call["args"]
    assert words[-3:] == ["--", "p", "q"]
    assert {"--pid", "--fork", "--kill-child"} <= set(words)
    for option, value in (("--root", str(tmp_path)), ("--wd", "/w"), ("--setuid", "5")):
        assert words[words.index(option) + 1] == value


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    """With one stage built by hand."""
    text = "FROM debian:x-slim AS one\nRUN --mount=type=bind x\n"
    made = Builder(
        Dockerfile.parse(text), tmp_path / "context", tmp_path / "work", Mirrors.of_host, print
    )
    for path in (made.context, made.work, made.work / "one/etc"):
        path.mkdir(parents=True)
    (made.work / "one/etc/passwd").write_text("root:x:0:0:r:/root:/bin/sh\n")
    made._built["one"] = made.work / "one"
    return made


@pytest.mark.parametrize(
    ("step", "complaint"),
    [
        ("RUN --mount=type=bind x", "--mount=type=bind is not supported"),
        ("COPY --chmod=1 a b", "COPY --chmod is not supported"),
        ("COPY --from=two a b", "--from=two: no such stage above"),
        ("COPY nothing /", "COPY nothing: not there, or ignored"),
        ("COPY ignored /", "COPY ignored: not there, or ignored"),
    ],
)
def test_steps_that_cannot_be_carried_out(builder: Builder, step: str, complaint: str) -> None:
    (builder.context / ".dockerignore").write_text("ignored")
    (builder.context / "ignored").touch()
    (builder.work / "context").mkdir()
    (instruction,) = Dockerfile.parse(f"FROM a\n{step}\n").stages[0].steps
    with pytest.raises((RootError, DockerfileError), match=complaint):
        builder._carry_out(instruction, builder.work / "one", Image())


def test_only_debian_can_be_substituted(builder: Builder, tmp_path: Path) -> None:
    stage = Dockerfile.parse("FROM alpine\n").stages[0]
    with pytest.raises(DockerfileError, match="FROM alpine: without an engine only debian"):
        builder._substitute(stage, tmp_path / "root")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--target", "x"], "there is no stage 'x'"),
        (["--build-arg", "x"], "write NAME=VALUE"),
        (["--build-arg", "NO=1"], "no ARG is named NO"),
        (["--context", "/nowhere"], "/nowhere/Dockerfile"),
    ],
)
def test_mistakes_are_told(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert image_check.main(arguments) == 1
    assert complaint in capsys.readouterr().err


def test_what_is_needed_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert image_check.main([]) == 1
    assert "run it with sudo" in capsys.readouterr().err
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "")
    assert image_check.main([]) == 1
    assert "install debootstrap, mount, unshare first" in capsys.readouterr().err


def test_nothing_is_removed_through_a_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    (work / "a").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *_, **__: f"36 35 0:1 / {work}/a rw - tmpfs")
        image_check._remove(work)
    assert "something is mounted" in capsys.readouterr().out
    assert (work / "a").exists()
    image_check._remove(work)
    assert not work.exists()


needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare"
)


def box(program: str, check: str = "true") -> Container:
    """The machine's own root as a container that runs a shell's program."""
    text = f'FROM a\nHEALTHCHECK CMD {check}\nSTOPSIGNAL SIGUSR1\nENTRYPOINT ["sh", "-c"]\n'
    image = replace(Dockerfile.parse(text).image("0"), cmd=(program,))
    return Container(Path("/"), image, Account(*ME, "/"), {})


@needs_root
def test_the_signal_reaches_process_one(tmp_path: Path) -> None:
    program = "trap 'echo $$; exit 7' USR1; echo ready; while :; do sleep 0.02; done"
    with Server(box(program), tmp_path / "log", {}) as server:
        server.wait_until_healthy()
        until(lambda: "ready" in server.said())
        status, _ = server.stop()
    assert status == 7
    assert server.said() == "ready\n1\n"


@needs_root
def test_a_server_that_ends_by_itself_is_told_with_its_log(tmp_path: Path) -> None:
    stuck = box("echo cannot listen; exit 3", check="false")
    with (
        Server(stuck, tmp_path / "log", {}) as server,
        pytest.raises(RootError, match="ended by itself:\ncannot listen"),
    ):
        server.wait_until_healthy()


@needs_root
def test_nothing_goes_on_after_a_failure(tmp_path: Path) -> None:
    with Server(box("echo ready; sleep 100"), tmp_path / "log", {}) as server:
        until(lambda: "ready" in server.said())
        first = server._first_process()
    until(lambda: not Path(f"/proc/{first}").exists())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
