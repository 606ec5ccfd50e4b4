"""Ingress and rollout reach the replicas by Serve's handle, whose errors become ours."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any, Final

import grpc
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import Message

from deploy.ray.forward import ReplicaLost
from deploy.ray.wire import Accepted, Identity, Reply, Target
from engine.errors import EngineStopped

EVERYBODY_SECONDS: Final = 10.0  # in which all replicas must have answered
RELOAD_SECONDS: Final = 1800.0  # in which all replicas must have loaded a checkpoint, in turn

logger = logging.getLogger("ambidex.server")


class Reach:
    """The replicas behind a handle of the deployment `Model`."""

    def __init__(self, model: DeploymentHandle[Any]) -> None:
        self._model = model
        # gRPC takes half the time of Ray's object store for a stream of small pieces.
        self._calls = model.options(method_name="call", stream=True, _by_reference=False)

    async def call(
        self, target: Target, scope: dict[str, Any], body: bytes
    ) -> AsyncGenerator[Accepted | list[Message], None]:
        """Send one HTTP request to one replica; see `deploy.ray.forward.Replicas`."""
        stream = self._calls.remote(target, scope, body)
        complete = False
        try:
            async for item in stream:
                yield item
            complete = True
        except RayTaskError as error:  # the replica lives, but its code has raised
            complete = True
            raise RuntimeError("a replica's code raised") from error
        except DeploymentUnavailableError as error:
            raise EngineStopped("no replica could be started") from error
        except (RayError, grpc.RpcError) as error:
            raise ReplicaLost(str(error)[:500]) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise ReplicaLost("it was shut down") from None  # it was the replica that cancelled
        finally:
            if not complete:
                stream.cancel()

    async def everybody(self, method: str) -> list[Any]:
        """What `method` returns at every replica that answers."""
        response = self._model.broadcast(method)
        try:
            found = await response.results_async(
                timeout_s=EVERYBODY_SECONDS, return_exceptions=True
            )
        except (TimeoutError, DeploymentUnavailableError) as error:
            raise EngineStopped("the replicas do not answer") from error
        return [each for each in found if not isinstance(each, BaseException)]

    async def identities(self) -> list[Identity]:
        """Which weights every replica serves."""
        return await self.everybody("identity")

    async def reload(self, replica: str, path: str) -> Reply | None:
        """Let one replica serve the checkpoint `path`; None if it is gone."""
        try:
            reply: Reply | None = await self._model.reload.remote(Target(only=replica), path)
        except RayTaskError:
            raise
        except RayError:
            return None
        return reply


async def reload_all(
    rollout: DeploymentHandle[Any], scope: dict[str, Any], body: bytes
) -> list[Message]:
    """Ask the rollout to answer `POST /admin/reload`; returns the messages of its response.

    Raises:
        EngineStopped: no replica runs, or nobody can say what came of it.
    """
    try:
        async with asyncio.timeout(RELOAD_SECONDS):
            messages: list[Message] = await rollout.reload.remote(scope, body)
    except (RayError, RayServeException, grpc.RpcError) as error:
        logger.exception("a reload broke off")
        raise EngineStopped("the reload broke off; look at /admin/status") from error
    except TimeoutError:
        message = f"the reload takes longer than {RELOAD_SECONDS:g} s; look at /admin/status"
        raise EngineStopped(message) from None
    if not messages:
        raise EngineStopped("no replica runs")
    return messages
