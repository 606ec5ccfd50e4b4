"""What any server of models has: its state, latency and load."""

from __future__ import annotations

from collections.abc import Iterator

from deploy.grafana.panels import (
    JOB,
    Panel,
    chosen,
    distribution,
    graph,
    listing,
    mean,
    rate,
    tile,
)


def overview() -> Iterator[Panel]:
    yield tile(
        "Servers ready",
        "Servers that take requests.",
        "none",
        f"sum({chosen('ambidex_ready')})",
    )
    yield tile(
        "Generated tokens a second",
        "All chosen servers together, over 5 minutes.",
        "short",
        f"sum({chosen('instance:ambidex_generated_tokens:rate5m')})",
    )
    yield tile(
        "First token, 95%",
        "19 of 20 requests had their first token after so long, on the slowest server. Red where "
        "AmbidexSlowFirstToken fires.",
        "s",
        f"max({chosen('instance:ambidex_time_to_first_token_seconds:p95_rate5m')})",
        red=5,
    )
    yield tile(
        "Experts that a token used",
        "Share of all experts, over all layers and tokens, prompts included. 100% is dense.",
        "percentunit",
        f"avg({chosen('instance:ambidex_experts_activated:ratio_rate5m')})",
    )
    yield tile(
        "Turned away",
        "Share of requests that got 429 or 503, on the worst server. Red where AmbidexRejecting "
        "fires.",
        "percentunit",
        f"max({chosen('instance:ambidex_rejections:ratio_rate5m')})",
        red=0.02,
    )
    yield tile(
        "Router coverage",
        "Share of the true activation mass that the chosen experts hold, on sampled sparse tokens, "
        "of all servers.",
        "percentunit",
        "min(job:ambidex_router_coverage:ratio_rate30m)",
    )
    info = f"{chosen('ambidex_model_info')} * on (job, instance, replica) group_left (version)"
    yield listing(
        "Servers",
        "What each server runs: its version and its checkpoint.",
        {"Servers": ("none", f"{info} {chosen('ambidex_build_info')}")},
        ["job", "Value"],
        instance="Server",
        replica="Replica",
        version="Version",
        name="Checkpoint",
        fingerprint="Fingerprint",
    )
    yield listing(
        "Alerts that fire",
        "docs/alerts.md says what each means and what to do.",
        {"Alerts": ("none", 'ALERTS{alertname=~"Ambidex.*",alertstate="firing"}')},
        ["alertstate", "job", "__name__", "Value"],
        alertname="Alert",
        severity="Severity",
        instance="Server",
    )


def latency() -> Iterator[Panel]:
    for title, text, metric in (
        (
            "Time to first token",
            "From a request's arrival in the engine: queue and prompt.",
            "instance:ambidex_time_to_first_token_seconds",
        ),
        (
            "Between two tokens",
            "What a reader of a stream waits: a step, and what the batch's prompts add to it.",
            "instance:ambidex_inter_token_seconds",
        ),
    ):
        yield graph(
            title,
            text,
            "s",
            {
                "{{instance}} 50%": chosen(f"{metric}:p50_rate5m"),
                "{{instance}} 95%": chosen(f"{metric}:p95_rate5m"),
            },
        )
    yield graph(
        "Where the time goes",
        "Mean seconds of a request in the queue, in its prompt, and in its answer.",
        "s",
        {
            "queue": mean("ambidex_request_queue_seconds"),
            "prompt": mean("ambidex_request_prefill_seconds"),
            "answer": mean("ambidex_request_decode_seconds"),
        },
        stacked=True,
    )
    yield distribution(
        "First tokens",
        "How the times to first token spread: two bands are two kinds of requests.",
        "s",
        "ambidex_time_to_first_token_seconds",
    )
    yield graph(
        "Whole requests and their queue, 95%",
        "19 of 20 requests ended, or left the queue, after so long.",
        "s",
        {
            "{{instance}} whole": chosen("instance:ambidex_request_seconds:p95_rate5m"),
            "{{instance}} queue": chosen("instance:ambidex_request_queue_seconds:p95_rate5m"),
        },
    )
    yield graph(
        "Event loop, 99%",
        "How late the event loop was, 1 time in 100. AmbidexEventLoopLag fires above 0.25 s.",
        "s",
        {"{{instance}}": chosen("instance:ambidex_event_loop_lag_seconds:p99_rate5m")},
    )


def load() -> Iterator[Panel]:
    yield graph(
        "Requests that run and wait",
        "When more wait than run, they wait longer than they run: AmbidexQueueGrowing.",
        "short",
        {
            "{{instance}} run": chosen("ambidex_requests_running"),
            "{{instance}} wait": chosen("ambidex_requests_waiting"),
        },
    )
    yield graph(
        "Requests by their end",
        "Requests a second: full length, end of text, stop sequence; abort is a client that left "
        "or a deadline, error a step that failed.",
        "reqps",
        {"{{reason}}": rate("ambidex_requests_total", "reason")},
        stacked=True,
    )
    yield graph(
        "Requests turned away, and late ones",
        "A second: overloaded and stopped are the server's, invalid, unauthorized and rate_limited "
        "the clients'. Late ones ran into their deadline.",
        "reqps",
        {
            "{{reason}}": rate("ambidex_rejections_total", "reason"),
            "late": rate("ambidex_deadlines_exceeded_total"),
        },
    )
    yield graph(
        "Tokens a second",
        "Of prompts, as their requests begin, and generated.",
        "short",
        {
            "{{instance}} generated": chosen("instance:ambidex_generated_tokens:rate5m"),
            "{{instance}} prompts": chosen("instance:ambidex_prompt_tokens:rate5m"),
        },
    )
    yield graph(
        "KV cache and prefix cache",
        "Share of the KV blocks in use (AmbidexKVCacheFull above 95%), and of the prompt tokens "
        "that were found in the prefix cache.",
        "percentunit",
        {
            "{{instance}} blocks in use": chosen("ambidex_kv_used_ratio"),
            "{{instance}} prefix hits": chosen("instance:ambidex_prefix_cache_hits:ratio_rate5m"),
        },
    )
    yield graph(
        "Preemptions a second",
        "Requests that gave their KV blocks up to others, and compute them again.",
        "short",
        {"{{instance}}": rate("ambidex_preemptions_total", "instance")},
    )
    yield graph(
        "Requests and tokens of a step",
        "Means: how well batches fill, and how much prompts add to them.",
        "short",
        {"requests": mean("ambidex_batch_requests"), "tokens": mean("ambidex_batch_tokens")},
    )
    yield graph(
        "Memory",
        "Resident memory of the process, with weights and KV cache where they are not on a GPU.",
        "bytes",
        {"{{instance}}": chosen("process_resident_memory_bytes", JOB)},
    )
    yield graph(
        "CPU",
        "Cores that the process keeps busy.",
        "short",
        {"{{instance}}": rate("process_cpu_seconds_total", "instance", JOB)},
    )
