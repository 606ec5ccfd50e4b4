"""The metrics of all replicas as one page, told apart by a label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

LABEL = "replica"


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
                    kept.samples.append(sample._replace(labels={**sample.labels, LABEL: replica}))
        return iter(families.values())


def merge(pages: Iterable[tuple[str, bytes]]) -> bytes:
    """Merge the pages of all replicas into one, in which every sample has the label `replica`.

    Args:
        pages: (replica, its page in Prometheus' text format) of each.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged({replica: page.decode() for replica, page in pages}))
    return generate_latest(registry)
