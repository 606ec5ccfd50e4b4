"""What ingress, rollout and replicas send to each other: calls, answers, and pages of metrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.types import Message, Scope

from server.engines.reload import Result

# The label by which the samples of different replicas are told apart.
_LABEL: Final = "replica"
# The fields of an ASGI HTTP scope that describe the request and not the server that took it.
_FIELDS: Final = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string"),
    *("root_path", "headers", "client", "server"),
)


@dataclass(frozen=True)
class Target:
    """Which replica a call is for.

    Attributes:
        key: the key of the prompt's beginning (deploy.ray.affinity).
        avoid: replicas that were asked already; they come last.
        only: the only replica that may take the call; None: any.
    """

    key: bytes | None = None
    avoid: frozenset[str] = frozenset()
    only: str | None = None


@dataclass(frozen=True)
class Accepted:
    """The first item of a replica's answer to a call: who it is, and whether it takes the call."""

    replica: str
    taken: bool = True


@dataclass(frozen=True)
class Identity:
    """Which weights a replica serves.

    Attributes:
        replica: the replica's id.
        digest: the digest of its checkpoint's content.
    """

    replica: str
    digest: str


@dataclass(frozen=True)
class Reply:
    """What came of a replica's attempt to load a checkpoint.

    Attributes:
        result: what `server.engines.reload` says, or "absent": the replica does not see the
            checkpoint, as on a shared file system that shows new directories some seconds late.
        error: what was wrong.
    """

    result: Result | Literal["absent"]
    error: str = ""


def plain_scope(scope: Scope) -> dict[str, Any]:
    """The part of `scope` that is sent to another process."""
    return {name: scope[name] for name in _FIELDS if name in scope}


def merged_body(messages: list[Message]) -> list[Message]:
    """The same response in fewer messages: consecutive pieces of the body are joined."""
    out: list[Message] = []
    for message in messages:
        last = out[-1] if out else None
        if last and last["type"] == message["type"] == "http.response.body":
            body = last.get("body", b"") + message.get("body", b"")
            out[-1] = {**message, "body": body}
        else:
            out.append(message)
    return out


class _Merged(Collector):
    def __init__(self, pages: Mapping[str, str]) -> None:
        self.pages = pages

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, page in self.pages.items():
            for family in text_string_to_metric_families(page):
                kept = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    kept.samples.append(sample._replace(labels={**sample.labels, _LABEL: replica}))
        return iter(families.values())


def merged_metrics(pages: Iterable[tuple[str, bytes]]) -> bytes:
    """Merge the pages of all replicas into one, in which every sample has the label `replica`.

    Args:
        pages: (replica, its page in Prometheus' text format) of each.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged({replica: page.decode() for replica, page in pages}))
    return generate_latest(registry)
