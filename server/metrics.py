"""The engine's numbers in the Prometheus text format.

A custom collector over one consistent snapshot: a scrape never sees half a step, and the engine
knows nothing of Prometheus. Base units, `ambidex_` prefix, counters end in `_total`. Ratios are two
counters, so that `rate(a) / rate(b)` works over any window.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from engine.stats import Histogram, Numbers
from server.fleet import Fleet
from server.loop_lag import LoopLag
from server.reload import RESULTS, Reloader
from server.settings import Settings
from server.version import VERSION

# (name without the prefix, help, the histogram of a snapshot)
HISTOGRAMS: Final[tuple[tuple[str, str, Callable[[Numbers], Histogram]], ...]] = (
    (
        "request_activated_ratio",
        "Share of the experts that a finished request used, over its tokens and layers.",
        lambda n: n.activated_ratio,
    ),
    (
        "time_to_first_token_seconds",
        "From a request's arrival in the engine to its first token.",
        lambda n: n.first_token_seconds,
    ),
    (
        "inter_token_seconds",
        "Between two tokens of a request.",
        lambda n: n.inter_token_seconds,
    ),
    (
        "request_queue_seconds",
        "From a request's arrival to its first admission.",
        lambda n: n.queue_seconds,
    ),
    (
        "request_prefill_seconds",
        "From a request's admission to its first token.",
        lambda n: n.prefill_seconds,
    ),
    (
        "request_decode_seconds",
        "From a request's first token to its last.",
        lambda n: n.decode_seconds,
    ),
    (
        "request_seconds",
        "From a request's arrival to its end.",
        lambda n: n.request_seconds,
    ),
    (
        "request_prompt_tokens",
        "Prompt tokens of a finished request.",
        lambda n: n.request_prompt_tokens,
    ),
    (
        "request_generated_tokens",
        "Generated tokens of a finished request.",
        lambda n: n.request_generated_tokens,
    ),
    (
        "batch_tokens",
        "Tokens of a step: decodes and prompt chunks.",
        lambda n: n.batch_tokens,
    ),
    (
        "batch_requests",
        "Requests of a step.",
        lambda n: n.batch_requests,
    ),
)

GAUGES: Final[tuple[tuple[str, str, Callable[[Numbers], float]], ...]] = (
    ("requests_running", "Requests that own KV blocks.", lambda n: n.running),
    ("requests_waiting", "Requests in the engine's queue.", lambda n: n.waiting),
    ("kv_blocks_used", "KV blocks in use.", lambda n: n.kv_blocks_used),
    ("kv_blocks", "KV blocks that exist.", lambda n: n.kv_blocks_total),
    (
        "kv_used_ratio",
        "Share of the KV blocks in use.",
        lambda n: n.kv_blocks_used / n.kv_blocks_total if n.kv_blocks_total else 0.0,
    ),
)

COUNTERS: Final[tuple[tuple[str, str, Callable[[Numbers], float]], ...]] = (
    ("steps_total", "Steps of the engine.", lambda n: n.steps),
    ("sampled_steps_total", "Steps in which routers were measured.", lambda n: n.sampled_steps),
    ("preemptions_total", "Times a request gave its KV blocks up.", lambda n: n.preemptions),
    ("prompt_tokens_total", "Prompt tokens of requests that began.", lambda n: n.prompt_tokens),
    ("generated_tokens_total", "Generated tokens.", lambda n: n.generated_tokens),
    (
        "prefix_cache_queried_tokens_total",
        "Prompt tokens that were looked up in the prefix cache.",
        lambda n: n.prefix_queried_tokens,
    ),
    (
        "prefix_cache_hit_tokens_total",
        "Those of them that were found, and not computed again.",
        lambda n: n.prefix_hit_tokens,
    ),
    ("aborts_total", "Requests that were aborted, as by a disconnect.", lambda n: n.aborts),
)

# per layer
LAYERS: Final[tuple[tuple[str, str, Callable[[Numbers], Sequence[float]]], ...]] = (
    (
        "experts_activated_total",
        "Experts used, summed over tokens.",
        lambda n: n.experts_activated,
    ),
    (
        "experts_available_total",
        "Experts that dense runs of the same tokens would have used.",
        lambda n: n.experts_available,
    ),
    (
        "experts_loaded_total",
        "Distinct experts that a step's tokens used together, summed over steps.",
        lambda n: n.experts_loaded,
    ),
    (
        "experts_loadable_total",
        "Experts of the layer, summed over steps.",
        lambda n: n.experts_loadable,
    ),
    (
        "neurons_activated_total",
        "Neurons of the experts used, summed over tokens.",
        lambda n: n.neurons_activated,
    ),
    (
        "neurons_available_total",
        "Neurons that dense runs of the same tokens would have used.",
        lambda n: n.neurons_available,
    ),
    (
        "router_captured_mass_total",
        "True activation mass of the chosen experts, over sampled sparse tokens.",
        lambda n: n.mass_captured,
    ),
    (
        "router_true_mass_total",
        "True activation mass of all experts, over sampled sparse tokens.",
        lambda n: n.mass_total,
    ),
    (
        "neurons_fired_total",
        "Neurons that were not zero, over sampled sparse tokens.",
        lambda n: n.neurons_fired,
    ),
    (
        "neurons_sampled_total",
        "All neurons, over sampled sparse tokens.",
        lambda n: n.neurons_sampled,
    ),
)

FINISH_REASONS: Final = ("length", "eos_token", "stop_sequence", "abort", "error")
REJECT_REASONS: Final = ("invalid", "overloaded", "stopped", "unauthorized", "rate_limited")


class Source(Protocol):
    """What is exported beside the engine's own numbers."""

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
    """A counter a reason; the known ones exist from the start, so that `rate` sees their first."""
    family = CounterMetricFamily(f"ambidex_{name}", text, labels=["reason"])
    for reason, value in ({**dict.fromkeys(known, 0), **values}).items():
        family.add_metric([reason], value)
    return family


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    """Prometheus wants cumulative counts, the last bucket named +Inf."""
    bounds = [*(f"{float(b):g}" for b in histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, itertools.accumulate(histogram.counts), strict=True))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=histogram.sum)


def make_registry(source: Source) -> CollectorRegistry:
    """A registry of this server alone: nothing is global, so servers can share a process."""
    registry = CollectorRegistry()
    registry.register(StatsCollector(source))
    return registry
