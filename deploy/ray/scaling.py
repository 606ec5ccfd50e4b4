"""How many replicas the load needs: from what the engines report, for Serve's autoscaler.

A replica reports its demand: the share of it that is in use, above 1 by what waits. Serve calls
`ScalingPolicy` with the replicas' demands and applies its own delays and bounds to the answer. The
policy is pickled into Serve's controller, so this file imports nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

DEMAND = "ambidex_demand"
TARGET_DEMAND = 0.8


def demand(running: int, waiting: int, max_running: int, kv_used: float) -> float:
    """How many replicas like this one its load would fill.

    Args:
        running: requests that own KV blocks.
        waiting: requests in the engine's queue.
        max_running: the most that may run.
        kv_used: share of the KV blocks in use, from 0 to 1.

    Returns:
        The larger share of places and of blocks while nothing waits. What waits shows that the
        replica is full with what runs, whichever bound it has met: then each waiting request counts
        as much as a running one.
    """
    full = max(running / max_running, kv_used)
    if not waiting:
        return full
    return max(full, 1.0) * (running + waiting) / max(running, 1)


class ScalingPolicy:
    """Asks for as many replicas as keep each in use to the share `target`."""

    def __init__(self, target: float = TARGET_DEMAND) -> None:
        if not 0 < target <= 1:
            raise ValueError(f"target must be above 0 and at most 1, got {target}")
        self.target = target

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Serve's interface: an AutoscalingContext in, (replicas, state to keep) out."""
        reported = (context.aggregated_metrics or {}).get(DEMAND, {})
        count = self.replicas(reported, context.current_num_replicas)
        return (context.target_num_replicas if count is None else count), {}

    def replicas(self, reported: Mapping[Any, float], current: int) -> int | None:
        """How many there should be; None if too little is known to say.

        Replicas that just start and have not reported yet count as the mean of the others.
        """
        if not reported or not current:
            return None
        mean = sum(reported.values()) / len(reported)
        wanted = mean * max(current, len(reported)) / self.target
        return max(1, math.ceil(wanted - 1e-9))
