"""One replica after another, none after a refusal, and the late ones catch up."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from deploy.ray.rolling import Rolling
from deploy.ray.wire import Identity, Reply
from engine.checkpoint import MANIFEST, content_digest


class Replicas:
    """Replicas that serve what they are told, but for what they refuse."""

    def __init__(self, *names: str) -> None:
        self.serves = dict.fromkeys(names, "")
        self.refuses: set[tuple[str, str]] = set()
        self.blind: set[str] = set()
        self.gone: set[str] = set()
        self.calls: list[tuple[str, str]] = []
        self.root = Path()
        self.at_once = 0

    async def identities(self) -> list[Identity]:
        return [Identity(name, digest) for name, digest in self.serves.items()]

    async def reload(self, replica: str, path: str) -> Reply | None:
        self.at_once += 1
        await asyncio.sleep(0)
        assert self.at_once == 1
        self.at_once -= 1
        self.calls.append((replica, path))
        if replica in self.gone:
            return None
        if replica in self.blind:
            return Reply("absent", "not there")
        if (replica, path) in self.refuses:
            return Reply("failure", "damaged")
        self.serves[replica] = content_digest(self.root / path)
        return Reply("success")


@pytest.fixture
def replicas(tmp_path: Path) -> Replicas:
    found = Replicas("a", "b", "c")
    found.root = tmp_path
    return found


@pytest.fixture
def rolling(replicas: Replicas, tmp_path: Path) -> Rolling:
    return Rolling(tmp_path, replicas)


def write(root: Path, name: str, when: int) -> str:
    """A checkpoint as far as a rollout looks at it; returns its digest."""
    path = root / name
    path.mkdir(exist_ok=True)
    (path / MANIFEST).write_text(json.dumps({"files": {name: when}}))
    os.utime(path / MANIFEST, ns=(when, when))
    return content_digest(path)


def test_one_after_another_and_only_once(
    rolling: Rolling, replicas: Replicas, tmp_path: Path
) -> None:
    asyncio.run(rolling.look())
    assert not replicas.calls
    old = write(tmp_path, "old", 10)
    replicas.serves = dict.fromkeys("abc", old)
    asyncio.run(rolling.look())
    assert not replicas.calls  # they serve it already
    new = write(tmp_path, "new", 20)
    for _ in range(2):
        asyncio.run(rolling.look())
        assert replicas.calls == [("a", "new"), ("b", "new"), ("c", "new")]
    assert set(replicas.serves.values()) == {new}


def test_a_refusal_by_the_first_stops_it(
    rolling: Rolling, replicas: Replicas, tmp_path: Path
) -> None:
    old = write(tmp_path, "old", 10)
    replicas.serves = dict.fromkeys("abc", old)
    write(tmp_path, "bad", 20)
    replicas.refuses.add(("a", "bad"))
    for _ in range(2):
        asyncio.run(rolling.look())
    assert replicas.calls == [("a", "bad")]
    replicas.refuses.clear()
    write(tmp_path, "bad", 30)  # written anew: it deserves another try
    asyncio.run(rolling.look())
    assert replicas.calls[1:] == [("a", "bad"), ("b", "bad"), ("c", "bad")]


def test_after_a_later_refusal_all_go_back(
    rolling: Rolling, replicas: Replicas, tmp_path: Path
) -> None:
    old = write(tmp_path, "old", 10)
    replicas.serves = dict.fromkeys("abc", old)
    asyncio.run(rolling.look())
    write(tmp_path, "bad", 20)
    replicas.refuses.add(("b", "bad"))
    asyncio.run(rolling.look())
    assert replicas.calls == [("a", "bad"), ("b", "bad"), ("a", "old")]
    assert set(replicas.serves.values()) == {old}


def test_after_the_first_of_all_nothing_is_there_to_go_back_to(
    rolling: Rolling, replicas: Replicas, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    replicas.serves = dict.fromkeys("abc", "the packaged model")
    write(tmp_path, "bad", 10)
    replicas.refuses.add(("b", "bad"))
    for _ in range(2):
        asyncio.run(rolling.look())
    assert replicas.calls == [("a", "bad"), ("b", "bad")]
    assert caplog.text.count("replicas serve different weights") == 1


def test_a_replica_that_does_not_see_it_yet_is_asked_again(
    rolling: Rolling, replicas: Replicas, tmp_path: Path
) -> None:
    old = write(tmp_path, "old", 10)
    replicas.serves = dict.fromkeys("abc", old)
    asyncio.run(rolling.look())
    new = write(tmp_path, "new", 20)
    replicas.blind.add("b")
    for _ in range(2):
        asyncio.run(rolling.look())
    assert replicas.calls == [("a", "new"), ("b", "new"), ("b", "new")]  # and a does not go back
    assert replicas.serves == {"a": new, "b": old, "c": old}
    replicas.blind.clear()
    asyncio.run(rolling.look())
    assert set(replicas.serves.values()) == {new}


def test_late_and_lost_replicas(rolling: Rolling, replicas: Replicas, tmp_path: Path) -> None:
    new = write(tmp_path, "new", 10)
    replicas.gone.add("b")
    asyncio.run(rolling.look())
    assert replicas.calls == [("a", "new"), ("b", "new"), ("c", "new")]
    replicas.gone.clear()
    replicas.serves = {"a": new, "c": new, "d": "something else"}
    replicas.calls.clear()
    asyncio.run(rolling.look())
    assert replicas.calls == [("d", "new")]


@pytest.mark.parametrize("linked", [False, True])
def test_a_choice_by_hand_stays(replicas: Replicas, tmp_path: Path, linked: bool) -> None:
    if linked:  # the replica that answers calls it by its real path
        (tmp_path / "models").mkdir()
        (tmp_path / "link").symlink_to("models")
        replicas.root, tmp_path = tmp_path / "link", tmp_path / "models"
    rolling = Rolling(replicas.root, replicas)
    old, new = write(tmp_path, "old", 10), write(tmp_path, "new", 20)
    asyncio.run(rolling.look())
    assert set(replicas.serves.values()) == {new}

    async def choose() -> None:
        async with rolling.lock:
            for name in "abc":
                await replicas.reload(name, "old")
            await rolling.keep(tmp_path / "old")

    asyncio.run(choose())
    replicas.serves["d"] = new  # starts with the newest, and is brought to the others
    asyncio.run(rolling.look())
    assert set(replicas.serves.values()) == {old}
    newest = write(tmp_path, "newest", 30)
    asyncio.run(rolling.look())
    assert set(replicas.serves.values()) == {newest}


def test_a_watched_checkpoint_that_is_replaced(replicas: Replicas, tmp_path: Path) -> None:
    replicas.root = tmp_path / "model"
    rolling = Rolling(replicas.root, replicas)
    for when in (10, 20):
        digest = write(tmp_path, "model", when)
        asyncio.run(rolling.look())
        assert set(replicas.serves.values()) == {digest}
    assert [path for _, path in replicas.calls] == ["."] * 6


def test_a_manifest_that_cannot_be_read(
    rolling: Rolling, replicas: Replicas, tmp_path: Path
) -> None:
    write(tmp_path, "good", 10)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / MANIFEST).write_text("{")
    asyncio.run(rolling.look())
    assert {path for _, path in replicas.calls} == {"good"}
