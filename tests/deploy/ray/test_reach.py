"""What Ray raises, in our words."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Message

pytest.importorskip("ray")
from ray.exceptions import RayActorError, RayTaskError

from deploy.ray import reach
from engine.errors import EngineStopped

ANSWER: list[Message] = [{"type": "http.response.start", "status": 200, "headers": []}]


def reload_with(outcome: list[Message] | Exception | float) -> list[Message]:
    """Reload by a rollout that answers, raises, or takes so many seconds."""

    async def remote(_scope: dict[str, Any], _body: bytes) -> list[Message]:
        if isinstance(outcome, Exception):
            raise outcome
        if isinstance(outcome, float):
            await asyncio.sleep(outcome)
            return ANSWER
        return outcome

    rollout: Any = SimpleNamespace(reload=SimpleNamespace(remote=remote))
    return asyncio.run(reach.reload_all(rollout, {}, b""))


def test_a_reload_passes_through() -> None:
    assert reload_with(ANSWER) == ANSWER


def test_a_reload_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "RELOAD_SECONDS", 0.01)
    with pytest.raises(EngineStopped, match=r"longer than 0\.01 s; look at /admin/status"):
        reload_with(10.0)


@pytest.mark.parametrize(
    "error",
    [
        RayActorError(),
        RayTaskError("reload", "traceback", EngineStopped("gone")).as_instanceof_cause(),
    ],
)
def test_a_reload_that_breaks_off(error: Exception) -> None:
    with pytest.raises(EngineStopped, match="broke off"):
        reload_with(error)


def test_a_reload_without_replicas() -> None:
    with pytest.raises(EngineStopped, match="no replica runs"):
        reload_with([])
