"""How the kernels are compiled, kept and found, and what happens where they cannot be.

No test here waits for a real compiler: a script stands in for it.
"""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.cpu import build, native

OTHERS_MAY_WRITE = (stat.S_IWGRP, stat.S_IWOTH)


@pytest.fixture(autouse=True)
def _forgetful() -> Iterator[None]:
    """Each test decides anew; the others get back what they had."""
    before = build.library()
    build.library.cache_clear()
    yield
    build.library.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        if before is None:
            patch.setenv("AMBIDEX_NATIVE", "0")
        assert (build.library() is None) == (before is None)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("AMBIDEX_CACHE", str(path))
    return path


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiles: str) -> Path:
    """A compiler that logs each compilation in `calls` and then does what `compiles` says."""
    script = tmp_path / "compiler"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo stand-in 1; exit; }\n'
        f'echo x >> "{tmp_path}/calls"\nfor out; do :; done\n{compiles}\n',
        encoding="utf-8",
    )
    script.chmod(0o700)
    monkeypatch.setenv("CC", str(script))
    return script


def calls(tmp_path: Path) -> int:
    log = tmp_path / "calls"
    return len(log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0


@pytest.mark.parametrize("how", ["CC leads nowhere", "nothing installed"])
def test_without_a_compiler_one_warning_says_so(
    how: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if how == "CC leads nowhere":
        monkeypatch.setenv("CC", "/nowhere/gcc")
    else:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", "")
    with caplog.at_level(logging.WARNING):
        assert build.library() is None
        assert build.library() is None
    assert len(caplog.records) == 1
    assert "C compiler" in caplog.text
    assert not native.supports(torch.float32, 64, 32)


def test_they_can_be_switched_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AMBIDEX_NATIVE", "0")
    assert build.library() is None
    assert not native.available()
    assert not caplog.records


def test_a_failed_compilation_leaves_nothing_and_says_why(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in(tmp_path, monkeypatch, 'echo half > "$out"; echo "no such register" >&2; exit 1')
    assert build.library() is None
    assert "no such register" in caplog.text
    assert list(cache.iterdir()) == []


def test_what_is_no_library_is_not_fatal(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in(tmp_path, monkeypatch, 'echo text > "$out"')
    assert build.library() is None
    assert len(caplog.records) == 1
    assert "could not be loaded" in caplog.text


def test_it_is_compiled_once_for_each_compiler(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = stand_in(tmp_path, monkeypatch, 'echo library > "$out"')
    first = build._built()
    assert build._built() == first
    assert calls(tmp_path) == 1
    assert first.parent == cache
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    script.write_text(script.read_text(encoding="utf-8").replace("stand-in 1", "stand-in 2"))
    assert build._built() != first
    assert calls(tmp_path) == 2


def test_the_compiler_may_have_arguments(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = stand_in(tmp_path, monkeypatch, 'echo library > "$out"')
    monkeypatch.setenv("CC", f"/bin/sh '{script}'")
    assert build._built().exists()


@pytest.mark.parametrize("permission", OTHERS_MAY_WRITE)
def test_a_cache_that_others_may_write_to_is_not_used(
    permission: int,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stand_in(tmp_path, monkeypatch, 'echo library > "$out"')
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setattr(build, "_private_directory", lambda: own)
    cache.mkdir()
    cache.chmod(0o700 | permission)
    assert build._built().parent == own
    assert list(cache.iterdir()) == []
    assert f"{cache} belongs to another user, or others may write to it" in caplog.text


def test_a_cache_that_cannot_be_made_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a volume that another user owns; root may write anywhere, hence a file in the way."""
    stand_in(tmp_path, monkeypatch, 'echo library > "$out"')
    (tmp_path / "file").touch()
    monkeypatch.setenv("AMBIDEX_CACHE", str(tmp_path / "file" / "cache"))
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setattr(build, "_private_directory", lambda: own)
    assert build._built().parent == own
    (record,) = caplog.records
    assert f"kept in {own} and compiled again by the next process" in record.getMessage()
    assert str(tmp_path / "file") in record.getMessage()
    assert "AMBIDEX_CACHE" in record.getMessage()


def test_a_user_without_a_home_gets_a_private_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("AMBIDEX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(build, "_private_directory", lambda: tmp_path)
    assert build._cache_directory() == tmp_path


def test_a_racing_process_sees_no_library_or_a_whole_one(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two compile at once, slowly; nothing lies under the final name until it is whole."""
    stand_in(
        tmp_path,
        monkeypatch,
        'printf half > "$out"\nwhile [ ! -e "$AMBIDEX_CACHE/../go" ]; do sleep 0.02; done\n'
        'printf whole > "$out"',
    )
    program = "from engine.kernels.native import build; print(build._built().read_text())"
    racing = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    found: list[Path] = []
    here = threading.Thread(target=lambda: found.append(build._built()))
    here.start()
    try:
        for _ in range(1500):  # 30 s for a process that imports torch
            if calls(tmp_path) == 2:
                break
            here.join(0.02)
        assert calls(tmp_path) == 2
        assert not list(cache.glob("cpu-*"))
    finally:
        (tmp_path / "go").touch()
        here.join(30)
        output, _ = racing.communicate(timeout=30)
    assert output.strip() == "whole"
    assert found[0].read_text(encoding="utf-8") == "whole"
    assert list(cache.iterdir()) == found
