"""The metrics of an engine: name, help text, and how to read the value from a snapshot.

Names stand here without their prefix `ambidex_`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from engine.histogram import Histogram
from engine.serving.stats import Numbers

# (name, help, the histogram of a snapshot)
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
