"""A Ray cluster on this machine, for tests: small, without a dashboard, and stopped at the end."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import cloudpickle
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from deploy.ray.app import application
from deploy.ray.options import Options
from deploy.ray.replica import Replica
from server.settings import Settings
from tests.server.conftest import Served, fail_steps, slow_down

CPUS = 2
OBJECT_STORE = 100_000_000
_NUMBERS = count()
_REPLICA = re.compile(r',?replica="([^"]*)"')

Start = Callable[..., AbstractContextManager["OnRay"]]


class FaultyReplica(Replica):
    """A replica to which tests do what happens to servers."""

    def slow_down(self, seconds: float) -> None:
        slow_down(self.front.engine, seconds)

    def fail_steps(self, after: int) -> None:
        fail_steps(self.front.engine, after)

    def refuse_requests(self) -> None:
        self.front.fleet.draining = True

    def fail_for_good(self) -> None:
        self.front.fleet.fail("a test said so")

    def pid(self) -> tuple[str, int]:
        return self.replica, os.getpid()


@dataclass
class OnRay(Served):
    """The application on Ray, from outside."""

    name: str
    model: DeploymentHandle[Any] = field(repr=False)

    def metrics(self) -> dict[str, float]:
        """Sums over the replicas, by the names that samples have on one machine."""
        sums: dict[str, float] = defaultdict(float)
        for name, value in super().metrics().items():
            sums[_REPLICA.sub("", name).replace("{}", "")] += value
        return dict(sums)

    def by_replica(self, name: str) -> dict[str, float]:
        """One metric of each replica."""
        found = {}
        for sample, value in super().metrics().items():
            if sample.startswith(f"{name}{{") and (match := _REPLICA.search(sample)):
                found[match[1]] = value
        return found

    def tell(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every replica."""
        return self.model.broadcast(method, *arguments).results(timeout_s=30)

    def active(self) -> int:
        statuses = self.tell("status")
        return sum(status["active"] + status["running"] for _, status in statuses)

    def fail_steps(self, after: int = 0) -> None:
        self.tell("fail_steps", after)

    def refuse_requests(self) -> None:
        self.tell("refuse_requests")

    def kill(self, replica: str) -> None:
        """End the process of a replica as the kernel would that is out of memory."""
        os.kill(dict(self.tell("pid"))[replica], signal.SIGKILL)


@contextmanager
def running(checkpoint: Path) -> Iterator[Start]:
    """Run Ray and Serve; yields what starts an application: `with start(replicas=2) as served`."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(
        "local",  # never somebody else's
        num_cpus=CPUS,
        num_gpus=0,
        object_store_memory=OBJECT_STORE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    try:
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})

        @contextmanager
        def start(
            step_seconds: float = 0.0, replicas: int = 1, max_replicas: int = 0, **values: Any
        ) -> Iterator[OnRay]:
            name = f"app-{next(_NUMBERS)}"
            defaults = {"model": checkpoint, "kv_cache_bytes": 8 << 20, "num_threads": 1}
            options = Options(
                min_replicas=replicas,
                max_replicas=max_replicas or replicas,
                upscale_delay=1.0,
                cpus=0.1,
            )
            app = application(Settings(**{**defaults, **values}), options, FaultyReplica)
            ray_serve.run(app, name=name, route_prefix=f"/{name}")
            url = f"http://127.0.0.1:{port}/{name}"
            with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
                served = OnRay(url, http, name, ray_serve.get_deployment_handle("Model", name))
                if step_seconds:
                    served.tell("slow_down", step_seconds)
                yield served
            ray_serve.delete(name)

        yield start
    finally:
        ray_serve.shutdown()
        ray.shutdown()
