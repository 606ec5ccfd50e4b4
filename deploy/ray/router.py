"""Chooses a replica for Serve, as `deploy.ray.affinity` decides."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deploy.ray.affinity import LOAD_BOUND, preferences
from deploy.ray.wire import Target


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Prefers the replica that has seen the beginning of the prompt, unless it is too busy.

    The load of a replica is what Serve knows of it in this process: the number of requests that it
    reported with the last answer, and those sent since.
    """

    load_bound = LOAD_BOUND

    def initialize_state(self, load_bound: float = LOAD_BOUND) -> None:
        """Take the arguments that the deployment's `request_router_kwargs` name."""
        self.load_bound = load_bound

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The replicas in groups, to be tried one after another."""
        target = _target(pending_request)
        if pending_request is not None:  # if all are full, Serve waits before it looks again
            pending_request.routing_context.should_backoff = True
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if target.only in by_id:
            return [[by_id[target.only]]]
        loads = {name: self._load(replica) for name, replica in by_id.items()}
        fresh = {name: load for name, load in loads.items() if name not in target.avoid}
        groups = preferences(target.key, fresh or loads, self.load_bound)
        return [[by_id[name] for name in group] for group in groups]

    def _load(self, replica: RunningReplica) -> int:
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def _target(request: PendingRequest | None) -> Target:
    first: Any = request.args[0] if request is not None and request.args else None
    return first if isinstance(first, Target) else Target()
