"""The engine's numbers in the Prometheus text format.

The collector reads one consistent snapshot, so a scrape never sees half a step, and the engine
knows nothing of Prometheus. Names begin with `ambidex_`, counters end in `_total`, and values are
in base units. A ratio is exported as two counters, so that `rate(a) / rate(b)` works over any
window.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from engine.histogram import Histogram
from engine.serving.stats import DECODE_BATCHES, DECODE_KINDS, Numbers
from engine.version import VERSION
from server.engines.fleet import Fleet
from server.engines.reload import RESULTS, Reloader
from server.metrics.loop_lag import LoopLag
from server.metrics.names import (
    COUNTERS,
    FINISH_REASONS,
    GAUGES,
    HISTOGRAMS,
    LAYERS,
    REJECT_REASONS,
)
from server.settings import Settings


class Source(Protocol):
    """Where the collector reads: the engine's numbers, and what else the server exports."""

    def numbers(self) -> Numbers: ...
    @property
    def ready(self) -> bool: ...
    @property
    def active(self) -> int: ...
    @property
    def deadlines_exceeded(self) -> int: ...
    @property
    def settings(self) -> Settings: ...
    @property
    def lag(self) -> LoopLag: ...
    @property
    def fleet(self) -> Fleet: ...
    @property
    def reloader(self) -> Reloader: ...
    @property
    def key_requests(self) -> Mapping[str, int]: ...
    @property
    def key_tokens(self) -> Mapping[str, int]: ...


class StatsCollector(Collector):
    """Turns a snapshot of the numbers into metric families."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def collect(self) -> Iterator[Metric]:
        numbers = self.source.numbers()
        yield from self._server()
        yield from self._model()
        yield from self._keys()
        yield from (_by_layer(name, text, read(numbers)) for name, text, read in LAYERS)
        yield from _decodes(numbers)
        if self.source.settings.expert_load:
            yield _load(numbers)
        yield _by_reason("requests_total", "Requests by how they ended.", numbers.finished)
        yield _by_reason(
            "rejections_total", "Requests that were refused.", numbers.rejected, REJECT_REASONS
        )
        for name, text, read in COUNTERS:
            yield CounterMetricFamily(f"ambidex_{name}", text, value=read(numbers))
        for name, text, read in GAUGES:
            yield GaugeMetricFamily(f"ambidex_{name}", text, value=read(numbers))
        for name, text, histogram in HISTOGRAMS:
            yield _histogram(f"ambidex_{name}", text, histogram(numbers))

    def _server(self) -> Iterator[Metric]:
        info = GaugeMetricFamily("ambidex_build_info", "Always 1.", labels=["version"])
        info.add_metric([VERSION], 1)
        yield info
        yield GaugeMetricFamily(
            "ambidex_ready",
            "1 while the engine makes progress and takes requests.",
            self.source.ready,
        )
        yield GaugeMetricFamily(
            "ambidex_live",
            "1 until the engine has failed for good, so that only a new process helps.",
            self.source.fleet.failure is None,
        )
        yield GaugeMetricFamily(
            "ambidex_http_requests_active", "Generation requests in the server.", self.source.active
        )
        yield CounterMetricFamily(
            "ambidex_deadlines_exceeded_total",
            "Requests that were ended because they took too long.",
            value=self.source.deadlines_exceeded,
        )

        yield _histogram(
            "ambidex_event_loop_lag_seconds",
            "How late the event loop was, asked ten times a second.",
            self.source.lag.histogram,
        )
        yield CounterMetricFamily(
            "ambidex_failed_steps_total", "Steps that raised.", value=self.source.fleet.failed_steps
        )
        yield CounterMetricFamily(
            "ambidex_engine_restarts_total",
            "Engines that took the place of one that failed.",
            value=self.source.fleet.restarts,
        )

    def _model(self) -> Iterator[Metric]:
        checkpoint = self.source.fleet.worker.engine.checkpoint
        info = GaugeMetricFamily(
            "ambidex_model_info",
            "The weights that serve; always 1.",
            labels=["name", "fingerprint"],
        )
        info.add_metric([checkpoint.path.resolve().name, checkpoint.fingerprint], 1)
        yield info
        yield GaugeMetricFamily(
            "ambidex_model_loaded_timestamp_seconds",
            "When these weights began to serve.",
            self.source.fleet.loaded_at,
        )
        yield GaugeMetricFamily(
            "ambidex_engines_retiring",
            "Replaced engines that finish what they have.",
            len(self.source.fleet.retiring),
        )
        reloads = CounterMetricFamily(
            "ambidex_reloads_total", "Reloads of the model, by result.", labels=["result"]
        )
        for result in RESULTS:
            reloads.add_metric([result], self.source.reloader.counts[result])
        yield reloads

    def _keys(self) -> Iterator[Metric]:
        yield _by_key(
            "key_requests_total", "Requests that generated, by key.", self.source.key_requests
        )
        yield _by_key(
            "key_generated_tokens_total", "Tokens generated, by key.", self.source.key_tokens
        )


def _decodes(numbers: Numbers) -> Iterator[Metric]:
    """Times and experts of steps that only decoded, by kind and batch as far as there were any."""
    labels = ["experts", "batch"]
    seconds = SummaryMetricFamily(
        "ambidex_decode_step_seconds",
        "How long steps took that only decoded, by their experts and up to so many requests.",
        labels=labels,
    )
    loaded = CounterMetricFamily(
        "ambidex_decode_experts_loaded_total",
        "Distinct experts that those steps read, over all layers.",
        labels=labels,
    )
    loadable = CounterMetricFamily(
        "ambidex_decode_experts_loadable_total",
        "Experts of all layers, summed over those steps.",
        labels=labels,
    )
    for i, kind in enumerate(DECODE_KINDS):
        for j, batch in enumerate(DECODE_BATCHES):
            if steps := numbers.decode_steps[i][j]:
                label = [kind, str(batch)]
                seconds.add_metric(label, int(steps), numbers.decode_step_seconds[i][j])
                loaded.add_metric(label, numbers.decode_loaded[i][j])
                loadable.add_metric(label, numbers.decode_loadable[i][j])
    yield from (seconds, loaded, loadable)


def _load(numbers: Numbers) -> Metric:
    family = CounterMetricFamily(
        "ambidex_expert_load_total",
        "Sampled sparse tokens that chose the expert.",
        labels=["layer", "expert"],
    )
    for layer, load in enumerate(numbers.expert_load):
        for expert, value in enumerate(load):
            family.add_metric([str(layer), str(expert)], value)
    return family


def _by_layer(name: str, text: str, values: Sequence[float]) -> Metric:
    family = CounterMetricFamily(f"ambidex_{name}", text, labels=["layer"])
    for layer, value in enumerate(values):
        family.add_metric([str(layer)], value)
    return family


def _by_key(name: str, text: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(f"ambidex_{name}", text, labels=["key"])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _by_reason(
    name: str, text: str, values: dict[str, int], known: Iterable[str] = FINISH_REASONS
) -> Metric:
    """A counter for each reason. Known ones begin at 0, so that `rate` sees their first event."""
    family = CounterMetricFamily(f"ambidex_{name}", text, labels=["reason"])
    for reason, value in ({**dict.fromkeys(known, 0), **values}).items():
        family.add_metric([reason], value)
    return family


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    """A histogram as Prometheus has it: counts are cumulative, and the last bucket is +Inf."""
    bounds = [*(f"{float(b):g}" for b in histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, itertools.accumulate(histogram.counts), strict=True))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=histogram.sum)


def make_registry(source: Source) -> CollectorRegistry:
    """A registry for this server alone, so that several servers can share a process."""
    registry = CollectorRegistry()
    registry.register(StatsCollector(source))
    ProcessCollector(registry=registry)
    return registry
