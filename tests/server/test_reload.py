"""New weights while requests run: none is lost or mixed, and what is bad is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch

from engine import checkpoint as checkpoints
from engine.errors import InvalidRequest
from engine.serving.worker import Worker
from engine.text import structured
from server import memory
from server.fleet import Fleet
from server.reload import Candidate, Reloader, candidates, first_engine, inside, unreadable
from server.settings import Settings

if TYPE_CHECKING:
    from conftest import Live, Serve

ADMIN = "admin-0123456789abcdef"
HEADERS = {"Authorization": f"Bearer {ADMIN}"}
PARAMETERS = {"max_new_tokens": 24}
NUMBER = 6  # different checkpoints


def wait(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def models(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints that continue every text differently."""
    root = tmp_path_factory.mktemp("models")
    paths = []
    for number in range(NUMBER):
        loaded = checkpoints.load(checkpoint_dir)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            loaded.model.embedding.weight[1:].normal_(std=0.3, generator=generator)
        paths.append(root / f"model-{number}")
        checkpoints.save(paths[-1], loaded.model, loaded.tokenizer, {"number": number})
    return paths


def publish(model: Path, watched: Path, name: str) -> Path:
    """Copy a checkpoint into the watched directory as training would: whole, under its name."""
    temporary = watched / f".{name}.tmp"
    shutil.copytree(model, temporary)
    os.utime(temporary / "manifest.json")
    target = watched / name
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    return target


def fingerprint(path: Path) -> str:
    return checkpoints.load(path).fingerprint


def reload(live: Live, path: str | None = None) -> httpx.Response:
    body = None if path is None else {"path": path}
    return live.http.post("/admin/reload", json=body, headers=HEADERS)


def texts_by_model(serve: Serve, models: list[Path]) -> dict[str, str]:
    """What each model writes, by its fingerprint."""
    found = {}
    for model in models:
        with serve(model=model) as live:
            found[live.engine.checkpoint.fingerprint] = live.generate(**PARAMETERS)[
                "generated_text"
            ]
    return found


def ask(live: Live, stream: bool) -> tuple[int, str]:
    if not stream:
        response = live.post("/generate", **PARAMETERS)
        return response.status_code, response.json().get("generated_text", "")
    response = live.post("/generate_stream", **PARAMETERS)
    last = json.loads(response.text.removesuffix("\n\n").rpartition("data: ")[2])
    return response.status_code, last.get("generated_text", "")


def test_ten_reloads_under_load_lose_and_mix_nothing(
    serve: Serve, models: list[Path], tmp_path: Path
) -> None:
    """Every text is one model's own, all requests get one, and counters never fall."""
    texts = texts_by_model(serve, models)
    assert len(set(texts.values())) == NUMBER
    start = publish(models[-1], tmp_path, "start")
    answers: list[tuple[int, str]] = []
    stop = threading.Event()

    def client(number: int) -> None:
        while not stop.is_set():
            answers.append(ask(live, stream=number % 2 == 0))

    settings = {"watch": tmp_path, "watch_interval": 3600, "admin_key": ADMIN}
    with serve(model=start, step_seconds=0.002, max_num_seqs=4, **settings) as live:
        with ThreadPoolExecutor(6) as pool:
            clients = [pool.submit(client, n) for n in range(6)]
            counted = 0.0
            for turn in range(10):
                already = len(answers)
                target = publish(models[turn % NUMBER], tmp_path, f"step-{turn}")
                response = reload(live)
                assert response.status_code == 200, response.text
                assert response.json()["result"] == "success"
                assert response.json()["model"]["fingerprint"] == fingerprint(target)
                wait(lambda already=already: len(answers) > already + 6)
                metrics = live.metrics()
                tokens = metrics["ambidex_generated_tokens_total"]
                assert tokens >= counted
                counted = tokens
            stop.set()
            for each in clients:
                each.result(60)
        live.wait_until_idle()
        wait(lambda: not live.frontend.fleet.retiring)
        metrics = live.metrics()
    statuses = Counter(status for status, _ in answers)
    assert set(statuses) == {200}
    assert {text for _, text in answers} <= set(texts.values())
    assert len({text for _, text in answers}) == NUMBER
    assert metrics['ambidex_reloads_total{result="success"}'] == 10
    assert metrics['ambidex_requests_total{reason="length"}'] == len(answers)
    assert metrics["ambidex_generated_tokens_total"] == len(answers) * 24
    assert metrics["ambidex_request_generated_tokens_count"] == len(answers)
    assert metrics["ambidex_kv_blocks_used"] == 0


def test_a_request_under_way_finishes_on_its_own_weights(
    serve: Serve, models: list[Path], tmp_path: Path
) -> None:
    publish(models[0], tmp_path, "a")
    settings = {"watch": tmp_path, "watch_interval": 3600, "admin_key": ADMIN}
    with serve(step_seconds=0.01, model=models[0], **settings) as live:
        expected = live.generate(max_new_tokens=100)["generated_text"]
        with ThreadPoolExecutor(1) as pool:
            old = pool.submit(live.generate, max_new_tokens=100)
            wait(lambda: live.metrics()["ambidex_requests_running"] == 1)
            publish(models[1], tmp_path, "b")
            assert reload(live).json()["result"] == "success"
            assert len(live.frontend.fleet.retiring) == 1
            assert live.generate(max_new_tokens=100)["generated_text"] != expected
            assert old.result(60)["generated_text"] == expected
        wait(lambda: not live.frontend.fleet.retiring)


@pytest.fixture
def watching(serve: Serve, models: list[Path], tmp_path: Path) -> Iterator[Live]:
    """A server that looks every 50 ms at `tmp_path`, which has one checkpoint."""
    publish(models[0], tmp_path, "first")
    settings = {"watch": tmp_path, "watch_interval": 0.05, "admin_key": ADMIN}
    with serve(model=tmp_path / "first", **settings) as live:
        yield live


def served(live: Live) -> str:
    return str(live.http.get("/info").json()["model_sha"])


def test_a_newer_checkpoint_is_found(watching: Live, models: list[Path], tmp_path: Path) -> None:
    before = watching.http.get("/info").json()
    publish(models[1], tmp_path, "second")
    wait(lambda: served(watching) == fingerprint(models[1]))
    after = watching.http.get("/info").json()
    assert (before["model_id"], after["model_id"]) == ("first", "second")
    assert after["model_loaded_at"] > before["model_loaded_at"]
    name = f'ambidex_model_info{{fingerprint="{served(watching)}",name="second"}}'
    assert watching.metrics()[name] == 1
    shutil.rmtree(tmp_path / "second")  # its weights are in memory; an older one is no news
    time.sleep(0.2)
    assert served(watching) == after["model_sha"]


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip(path: Path) -> None:
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 4
    file.write_bytes(data)


def forget(path: Path) -> None:
    (path / "tokenizer.json").unlink()


def foreign(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    with checkpoints.atomic_directory(path) as directory:
        (directory / "config.json").write_text('{"model_type": "llama"}')


def too_small(path: Path) -> None:
    """Whole and verified, but its contexts are shorter than the settings promise."""
    config = json.loads((path / "config.json").read_text())
    config["max_position_embeddings"] = 8
    files = {f.name: f.read_bytes() for f in path.iterdir() if f.name != "manifest.json"}
    with checkpoints.atomic_directory(path) as directory:
        for name, data in files.items():
            (directory / name).write_bytes(data)
        (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("damage", [truncate, flip, forget, foreign, too_small])
@pytest.mark.parametrize("mode", ["beside", "drain"])
def test_a_bad_checkpoint_is_refused_and_the_old_one_serves_on(
    serve: Serve,
    models: list[Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    mode: str,
) -> None:
    publish(models[0], tmp_path, "good")
    settings = {"watch": tmp_path, "watch_interval": 3600, "admin_key": ADMIN}
    with serve(
        model=tmp_path / "good", max_total_tokens=64, reload_memory=mode, **settings
    ) as live:
        before = live.generate(max_new_tokens=10)
        damage(publish(models[1], tmp_path, "bad"))
        os.utime(tmp_path / "bad" / "manifest.json")
        response = reload(live)
        assert response.status_code == 409, response.text
        assert "refused a checkpoint" in caplog.text
        assert live.generate(max_new_tokens=10) == before
        assert live.metrics()['ambidex_reloads_total{result="failure"}'] == 1
        status = live.http.get("/admin/status", headers=HEADERS).json()
        assert status["last_reload_error"]
        assert status["ready"] is True


def test_the_watch_passes_a_bad_one_and_does_not_try_it_again(
    watching: Live, models: list[Path], tmp_path: Path
) -> None:
    hidden = publish(models[2], tmp_path, ".hidden")
    assert hidden.exists()
    (tmp_path / "unfinished").mkdir()
    flip(publish(models[1], tmp_path, "bad"))
    wait(lambda: watching.metrics()['ambidex_reloads_total{result="failure"}'] == 1)
    time.sleep(0.3)
    assert watching.metrics()['ambidex_reloads_total{result="failure"}'] == 1
    assert served(watching) == fingerprint(models[0])
    publish(models[1], tmp_path, "bad")  # the same name, whole this time
    wait(lambda: served(watching) == fingerprint(models[1]))


def test_a_path_that_is_replaced_is_watched_itself(
    serve: Serve, models: list[Path], tmp_path: Path
) -> None:
    """As `ambidex train` replaces its checkpoint, and by a link that is turned."""
    path = publish(models[0], tmp_path, "checkpoint")
    with serve(model=path, watch=path, watch_interval=0.05) as live:
        for model in (models[1], models[0]):
            data = {f.name: f.read_bytes() for f in model.iterdir() if f.name != "manifest.json"}
            with checkpoints.atomic_directory(path) as directory:
                for name, content in data.items():
                    (directory / name).write_bytes(content)
            wait(lambda model=model: served(live) == fingerprint(model))
    link = tmp_path / "current"
    link.symlink_to(models[2])
    with serve(model=link, watch=link, watch_interval=0.05) as live:
        turned = tmp_path / "turned"
        turned.symlink_to(models[3])
        turned.replace(link)
        wait(lambda: served(live) == fingerprint(models[3]))
        assert live.http.get("/info").json()["model_id"] == "model-3"


def test_reload_by_path_pins_an_older_one(
    watching: Live, models: list[Path], tmp_path: Path
) -> None:
    publish(models[1], tmp_path, "second")
    wait(lambda: served(watching) == fingerprint(models[1]))
    assert reload(watching, "first").json()["result"] == "success"
    time.sleep(0.2)
    assert served(watching) == fingerprint(models[0])
    assert reload(watching, "first").json()["result"] == "unchanged"
    publish(models[2], tmp_path, "third")
    wait(lambda: served(watching) == fingerprint(models[2]))


@pytest.mark.parametrize(
    "path", ["..", "../elsewhere", "/etc", "a/../../b", "link/x", "\0", "x" * 1025, ""]
)
def test_no_path_leads_out_of_the_watched_directory(
    watching: Live, tmp_path: Path, path: str
) -> None:
    (tmp_path / "link").symlink_to("/")
    response = reload(watching, path)
    assert response.status_code == 422
    assert "path" in response.json()["error"]


def test_what_is_not_there_or_not_watched(watching: Live, serve: Serve) -> None:
    missing = reload(watching, "nothing")
    assert missing.status_code == 409
    assert missing.json()["error_type"] == "checkpoint"
    unknown = watching.http.post("/admin/reload", json={"paht": "x"}, headers=HEADERS)
    assert unknown.status_code == 422
    with serve(admin_key=ADMIN) as live:
        assert reload(live).json()["result"] == "unchanged"
        refused = reload(live, "x")
        assert refused.status_code == 422
        assert "AMBIDEX_WATCH" in refused.json()["error"]
        assert live.http.post("/admin/reload").status_code == 401


def test_without_room_for_two_the_old_one_goes_first(
    serve: Serve, models: list[Path], tmp_path: Path
) -> None:
    publish(models[0], tmp_path, "a")
    settings = {"watch": tmp_path, "watch_interval": 3600, "admin_key": ADMIN}
    with serve(model=tmp_path / "a", reload_memory="drain", step_seconds=0.01, **settings) as live:
        model = weakref.ref(live.engine.checkpoint.model)
        loaded: list[Any] = []
        load = checkpoints.load

        def note(*args: Any, **kwargs: Any) -> Any:
            loaded.append(model())
            return load(*args, **kwargs)

        with ThreadPoolExecutor(1) as pool, pytest.MonkeyPatch.context() as patch:
            old = pool.submit(live.generate, max_new_tokens=50)
            wait(lambda: live.metrics()["ambidex_requests_running"] == 1)
            patch.setattr("engine.serving.engine.checkpoints.load", note)
            publish(models[1], tmp_path, "b")
            assert reload(live).json()["result"] == "success"
            assert old.result(60)
        assert loaded == [None], "the old weights were still in memory"
        assert served(live) == fingerprint(models[1])
        assert live.generate(max_new_tokens=5)


def test_the_first_model_is_the_newest_that_loads(models: list[Path], tmp_path: Path) -> None:
    publish(models[1], tmp_path, "older")
    time.sleep(0.01)
    flip(publish(models[2], tmp_path, "newer"))
    settings = Settings(model=models[0], watch=tmp_path, kv_cache_bytes=1 << 20)
    assert first_engine(settings).checkpoint.path.name == "older"
    empty = Settings(model=models[0], watch=tmp_path / "none", kv_cache_bytes=1 << 20)
    assert first_engine(empty).checkpoint.path == models[0]


def test_a_checkpoint_replaced_while_it_is_read_is_refused(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = publish(models[0], tmp_path, "a")
    load_tensors = checkpoints.load_tensors

    def replaced(*args: Any) -> Any:
        publish(models[1], tmp_path, "a")
        return load_tensors(*args)

    monkeypatch.setattr(checkpoints, "load_tensors", replaced)
    with pytest.raises(checkpoints.CheckpointError, match="replaced while it was read"):
        checkpoints.load(path)


def test_candidates_and_paths(models: list[Path], tmp_path: Path) -> None:
    assert candidates(tmp_path / "nothing") == []
    assert candidates(tmp_path) == []
    for number in (0, 1):
        publish(models[number], tmp_path, f"m{number}")
        time.sleep(0.01)
    assert [c.path.name for c in candidates(tmp_path)] == ["m1", "m0"]
    assert candidates(tmp_path / "m0") == [Candidate.at(tmp_path / "m0")]
    assert inside(tmp_path, "m0") == (tmp_path / "m0").resolve()
    for path in ("..", "/", "m0/../..", str(tmp_path / "m0")):
        with pytest.raises(InvalidRequest, match="path"):
            inside(tmp_path, path)


def test_what_may_not_be_read_is_said_once(
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As on a volume that belongs to another user; root may read anything, hence the patches."""
    theirs = publish(models[1], tmp_path, "theirs")
    (tmp_path / "lost+found").mkdir()
    assert unreadable(tmp_path) is None
    assert unreadable(theirs) is None
    assert unreadable(tmp_path / "not there yet") is None
    real = Path.stat

    def refusing(path: Path, **options: Any) -> os.stat_result:
        if path.parent.name in ("theirs", "lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", refusing)
    settings = Settings(model=models[0], watch=tmp_path, kv_cache_bytes=1 << 20)
    engine = first_engine(settings)
    assert engine.checkpoint.path == models[0]
    reloader = Reloader(Fleet(Worker(engine), settings), settings)
    assert reloader._newer() == []
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("AMBIDEX_WATCH: user ")
    assert said.endswith(f"cannot read {theirs / 'manifest.json'}: Permission denied")

    def closed(path: Path) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", closed)
    assert f"cannot read {tmp_path}:" in (unreadable(tmp_path) or "")
    assert reloader._newer() == reloader._newer() == []
    assert len(caplog.records) == 2


def test_memory_that_is_left(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 10 kB\nMemAvailable:    7 kB\n")
    assert memory._of_machine(meminfo) == 7 << 10
    assert memory._of_machine(tmp_path / "none") is None
    for name, text in (("max", "1000"), ("current", "900"), ("stat", "anon 5\ninactive_file 300")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory._of_group(tmp_path) == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._of_group(tmp_path) is None
    assert (memory.available_bytes("cpu") or 1) > 0


def test_who_never_gives_a_lease_back_does_not_keep_the_old_weights(
    serve: Serve, models: list[Path], tmp_path: Path
) -> None:
    publish(models[0], tmp_path, "first")
    settings = {"watch": tmp_path, "watch_interval": 3600, "admin_key": ADMIN}
    with serve(model=models[0], retire_timeout=0.3, **settings) as live:
        fleet = live.frontend.fleet
        with fleet.lease() as old:
            publish(models[1], tmp_path, "second")
            assert reload(live).json()["result"] == "success"
            wait(lambda: not fleet.retiring, 10)
            assert not old.running
        assert live.generate(max_new_tokens=3)


def test_the_vocabulary_is_read_before_a_request_needs_it(
    serve: Serve, models: list[Path], tmp_path: Path
) -> None:
    """At the start and with a reload; the same tokenizer's is not read again."""
    read = structured._vocabulary
    read.cache_clear()
    first_engine(Settings(model=models[0], kv_cache_bytes=8 << 20))
    assert read.cache_info().misses == 1
    read.cache_clear()
    publish(models[0], tmp_path, "first")
    settings = {"watch": tmp_path, "watch_interval": 3600, "admin_key": ADMIN}
    with serve(model=models[0], **settings) as live:
        assert read.cache_info().misses == 0
        for number in (1, 2):
            publish(models[number], tmp_path, f"model-{number}")
            assert reload(live).json()["result"] == "success"
            assert read.cache_info().misses == 1
        grammar = {"type": "regex", "value": "[0-9]"}
        assert live.generate(grammar=grammar)["generated_text"].isdigit()
        assert read.cache_info().misses == 1
