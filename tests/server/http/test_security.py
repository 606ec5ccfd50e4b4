"""Keys: what they open, what they are called, how they are read; limits a minute."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from pydantic import ValidationError

from engine.errors import ConfigError
from server.http.ratelimit import RateLimited, RateLimiter
from server.http.security import HEALTH_PATHS, Forbidden, Key, Keyring, Unauthorized, parse_keys
from server.settings import Settings, explain

if TYPE_CHECKING:
    from tests.server.conftest import Live, Serve

ALICE, BOB, ADMIN = "alice-0123456789abcdef", "bob+0123456789/abcdef==", "admin-0123456789abcdef"
HASHED = f"sha256:{hashlib.sha256(BOB.encode()).hexdigest()}"
KEYS = f"alice:{ALICE}, bob:{HASHED}"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def closed(serve: Serve) -> Iterator[Live]:
    with serve(api_keys=KEYS, admin_key=ADMIN) as live:
        yield live


# Routes


def test_every_route_but_the_public_ones_needs_a_key(closed: Live) -> None:
    """Asked of every route that the application has, so that none is forgotten later."""
    public = {"/health", "/health/live", "/health/ready", "/metrics"}
    document = closed.http.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method in operations:
            response = closed.http.request(method, path)
            if path in public:
                assert response.status_code == 200, path
                continue
            assert response.status_code == 401, path
            assert response.headers["www-authenticate"] == "Bearer"
            body = response.json()
            if path.startswith("/v1/"):
                assert body["error"]["code"] == "invalid_api_key"
            else:
                assert body["error_type"] == "authentication"
            if not path.startswith("/admin"):
                known = closed.http.request(method, path, headers=bearer(ALICE))
                assert known.status_code not in (401, 403), path
    for path in ("/docs", "/openapi.json"):
        assert closed.http.get(path).status_code == 200
    assert closed.http.get("/nothing").status_code == 401


@pytest.mark.parametrize(
    "header",
    [
        *("", "Bearer", "Bearer wrong", f"Basic {ALICE}", ALICE, f"Bearer {ALICE}x"),
        *(f"Bearer {ALICE[:-1]}", f"Bearer {HASHED}", "Bearer " + "x" * 5000, f"Bearer {ALICE} x"),
    ],
)
def test_what_is_no_known_key_opens_nothing(closed: Live, header: str) -> None:
    response = closed.http.get("/info", headers={"Authorization": header})
    assert response.status_code == 401
    assert ALICE not in response.text


def test_known_keys_open_by_their_text_whether_kept_as_text_or_hash(closed: Live) -> None:
    for key in (ALICE, BOB, ADMIN):
        assert closed.http.get("/info", headers=bearer(key)).status_code == 200
    assert closed.http.get("/info", headers={"authorization": f"bearer  {BOB}"}).status_code == 200


def test_admin_routes_need_the_admin_key(closed: Live, serve: Serve) -> None:
    response = closed.http.get("/admin/status", headers=bearer(ALICE))
    assert response.status_code == 403
    assert response.json()["error_type"] == "permission"
    assert closed.http.get("/admin/nothing", headers=bearer(ALICE)).status_code == 403
    assert closed.http.get("/admin/nothing", headers=bearer(ADMIN)).status_code == 404
    with serve() as live:
        for headers in ({}, bearer(ADMIN)):
            closed_response = live.http.get("/admin/status", headers=headers)
            assert closed_response.status_code == 403
            assert "AMBIDEX_ADMIN_KEY" in closed_response.json()["error"]


def test_metrics_and_documentation_can_be_closed(serve: Serve) -> None:
    with serve(api_keys=KEYS, public_metrics=False, public_docs=False) as live:
        for path in ("/metrics", "/docs", "/openapi.json"):
            assert live.http.get(path).status_code == 401
            assert live.http.get(path, headers=bearer(ALICE)).status_code == 200
        assert live.http.get("/health").status_code == 200


def test_of_a_refused_client_s_body_little_is_read(closed: Live) -> None:
    """A small one away, so that the answer arrives and the connection lives; a large one not."""
    small = closed.http.post("/generate", content=b"x" * 60_000)
    assert small.status_code == 401
    assert "connection" not in small.headers
    address = urlsplit(closed.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as sock:
        sock.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n")
        answer = b"".join(iter(lambda: sock.recv(4096), b""))  # until the server hangs up
    assert answer.startswith(b"HTTP/1.1 401")
    with socket.create_connection((address.hostname, address.port), timeout=10) as sock:
        sock.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nx")
        answer = b"".join(iter(lambda: sock.recv(4096), b""))  # who dawdles is not waited for
    assert answer.startswith(b"HTTP/1.1 401")


def test_refusals_are_counted_and_requests_by_key(closed: Live) -> None:
    before = closed.metrics()
    closed.http.post("/generate", json={"inputs": "x"})
    body = {"inputs": "x", "parameters": {"max_new_tokens": 3}}
    for key in (ALICE, BOB, BOB):
        assert closed.http.post("/generate", json=body, headers=bearer(key)).status_code == 200
    closed.wait_until_idle()
    metrics = closed.metrics()

    def grown(name: str) -> float:
        return metrics[name] - before.get(name, 0)

    assert grown('ambidex_rejections_total{reason="unauthorized"}') == 1
    assert grown('ambidex_key_requests_total{key="alice"}') == 1
    assert grown('ambidex_key_requests_total{key="bob"}') == 2
    assert grown('ambidex_key_generated_tokens_total{key="bob"}') == 6


# Reading


def test_a_key_is_named_by_its_hash_if_by_nothing_else() -> None:
    digest = hashlib.sha256(ALICE.encode()).hexdigest()
    (plain,) = parse_keys([ALICE])
    assert plain.name == f"key-{digest[:8]}"
    assert plain == parse_keys([f"sha256:{digest}"])[0]
    assert ALICE not in repr(plain)
    assert parse_keys(["", " # comment", f"  a:{ALICE} "]) == (Key("a", plain.digest),)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("short", "16 to 512"),
        ("x" * 513, "16 to 512"),
        ("with a space 0123456789", "no space"),
        ("a:b:0123456789abcdef", "must be"),
        ("sha256:abc", "64 hexadecimal"),
        ("a:sha256:abc", "64 hexadecimal"),
        (f"na me:{ALICE}", "name must have"),
        (f":{ALICE}", "name must have"),
        ("schlüssel-0123456789", "printable"),
    ],
)
def test_lines_that_are_no_key_are_refused_without_being_shown(line: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        parse_keys([line])
    assert line not in str(caught.value)


def test_names_are_unique_and_keys_are_bounded() -> None:
    with pytest.raises(ConfigError, match="name of its own"):
        parse_keys([f"a:{ALICE}", f"a:{BOB}"])
    with pytest.raises(ConfigError, match="at most 1000"):
        parse_keys(f"n{i}:{ALICE}" for i in range(1001))
    with pytest.raises(ConfigError, match="name of its own"):
        Keyring([Key("admin", b"")], Key("admin", b"x"), HEALTH_PATHS)


def test_keys_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\nalice:{ALICE}\n\n{HASHED}\n")
    ring = Settings(api_keys_file=path, api_keys=f"carol:{ADMIN}").keyring()
    assert [key.name for key in ring.keys][:2] == ["carol", "alice"]
    found = ring.authorize("/info", f"Bearer {BOB}")
    assert found is not None
    assert found.name.startswith("key-")
    for text, sentence in (
        (b"", "holds no key"),
        (b"\xff\xfe", "utf-8"),
        (b"#" * (2 << 20), "MiB"),
    ):
        path.write_bytes(text)
        with pytest.raises(ValidationError, match=sentence):
            Settings(api_keys_file=path)
    with pytest.raises(ValidationError, match="nothing-here"):
        Settings(api_keys_file=tmp_path / "nothing-here")


def test_settings_never_show_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMBIDEX_API_KEYS", f"alice:{ALICE},bob:{BOB}")
    monkeypatch.setenv("AMBIDEX_ADMIN_KEY", ADMIN)
    settings = Settings()
    assert [key.name for key in settings.api_keys] == ["alice", "bob"]
    for secret in (ALICE, BOB, ADMIN):
        assert secret not in repr(settings)
    monkeypatch.setenv("AMBIDEX_API_KEYS", f"{ALICE},geheim")
    with pytest.raises(ValidationError) as caught:
        Settings()
    for text in (str(caught.value), explain(caught.value)):
        assert "api_keys" in text.lower()
        assert ALICE not in text
        assert "geheim" not in text
    monkeypatch.setenv("AMBIDEX_API_KEYS", "")
    monkeypatch.setenv("AMBIDEX_ADMIN_KEY", "")
    assert Settings().keyring().admin is None


def test_the_rules_of_a_keyring() -> None:
    (alice,), (admin,) = parse_keys([ALICE]), parse_keys([ADMIN])
    ring = Keyring([alice], admin, HEALTH_PATHS)
    assert ring.authorize("/health", "") is None
    assert ring.authorize("/health", "Bearer nonsense") is None
    assert ring.authorize("/", f"Bearer {ALICE}") is alice
    assert ring.authorize("/admin/x", f"Bearer {ADMIN}") is admin
    for path in ("/", "/healthy", "/health/", "/HEALTH", "//health", "/administration"):
        with pytest.raises(Unauthorized):
            ring.authorize(path, "")
    with pytest.raises(Forbidden):
        ring.authorize("/admin", f"Bearer {ALICE}")
    open_ring = Keyring([], admin, HEALTH_PATHS)
    assert open_ring.authorize("/", "") is None
    assert open_ring.authorize("/", f"Bearer {ADMIN}") is admin
    with pytest.raises(Unauthorized):
        open_ring.authorize("/admin/x", "")


# Limits a minute


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def wait_of(limiter: RateLimiter, key: str) -> float:
    """Seconds that the limiter asks to wait; 0 if it admits."""
    try:
        limiter.admit(key)
    except RateLimited as error:
        return error.retry_after
    return 0.0


def test_requests_a_minute() -> None:
    clock = Clock()
    limiter = RateLimiter(30, 0, clock)
    assert [wait_of(limiter, "a") for _ in range(31)] == [0.0] * 30 + [2.0]
    assert wait_of(limiter, "b") == 0.0  # another key has its own
    clock.now = 1.5
    assert wait_of(limiter, "a") == pytest.approx(0.5)
    clock.now = 2.0
    assert [wait_of(limiter, "a") for _ in range(2)] == [0.0, pytest.approx(2.0)]
    clock.now = 10_000.0  # no more than a minute's worth is saved
    assert [wait_of(limiter, "a") > 0 for _ in range(31)] == [False] * 30 + [True]


def test_generated_tokens_a_minute_are_paid_afterwards() -> None:
    clock = Clock()
    limiter = RateLimiter(0, 60, clock)
    limiter.admit("a")
    limiter.generated("a", 100)
    assert wait_of(limiter, "a") == pytest.approx(41.0)  # 40 owed, and one to begin with
    clock.now = 41.0
    assert wait_of(limiter, "a") == 0.0


def test_no_limit_never_waits() -> None:
    limiter = RateLimiter(0, 0)
    for _ in range(1000):
        limiter.admit("a")
        limiter.generated("a", 1 << 30)


def check_limited(response: Any) -> None:
    assert response.status_code == 429
    assert response.json()["error_type"] == "overloaded"
    assert int(response.headers["retry-after"]) >= 1


def test_limits_of_a_key_reach_the_client(serve: Serve) -> None:
    body = {"inputs": "x", "parameters": {"max_new_tokens": 2}}
    with serve(api_keys=KEYS, requests_per_minute=2) as live:
        for _ in range(2):
            response = live.http.post("/generate", json=body, headers=bearer(ALICE))
            assert response.status_code == 200
        refused = live.http.post("/generate_stream", json=body, headers=bearer(ALICE))
        check_limited(refused)
        assert "2 requests a minute" in refused.json()["error"]
        assert live.http.get("/info", headers=bearer(ALICE)).status_code == 200
        assert live.http.post("/generate", json=body, headers=bearer(BOB)).status_code == 200
        assert live.metrics()['ambidex_rejections_total{reason="rate_limited"}'] == 1


def test_generated_tokens_are_taken_as_they_come(serve: Serve) -> None:
    with serve(tokens_per_minute=5) as live:
        assert len(live.stream(max_new_tokens=8)) == 8
        refused = live.post("/generate")
        check_limited(refused)
        assert "5 generated tokens a minute" in refused.json()["error"]
        assert 40 <= int(refused.headers["retry-after"]) <= 48
