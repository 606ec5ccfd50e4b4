"""What no other server has: which experts run and what that saves; and which weights serve."""

from __future__ import annotations

from collections.abc import Iterator

from deploy.grafana.panels import (
    JOB,
    Panel,
    average,
    chosen,
    distribution,
    graph,
    increase,
    layers,
    listing,
)


def experts() -> Iterator[Panel]:
    def step(kind: str) -> str:
        metric = "instance_batch:ambidex_decode_step_seconds:mean_rate30m"
        return average(metric, "batch", f'experts="{kind}"')

    union = average("instance_batch:ambidex_decode_experts_loaded:ratio_rate30m", "batch")
    speedup = average("instance_batch:ambidex_sparse_speedup:ratio_rate30m", "batch")
    yield layers(
        "Activated experts by layer",
        "Share of each layer's experts that a token used. Rows are layers.",
        average("instance_layer:ambidex_experts_activated:ratio_rate5m", "layer"),
    )
    yield layers(
        "Router coverage by layer",
        "Share of the true activation mass that the chosen experts held, on sampled sparse tokens. "
        "A dark row is a layer whose router misses.",
        average("instance_layer:ambidex_router_coverage:ratio_rate30m", "layer"),
    )
    yield layers(
        "Firing neurons by layer",
        "Share of all neurons that were not zero for sampled sparse tokens: what a perfect router "
        "with experts of one neuron would need.",
        average("instance_layer:ambidex_neurons_fired:ratio_rate30m", "layer"),
    )
    yield graph(
        "Experts used by a token and read by a step",
        "A step reads the union of its tokens' experts. Near 100% sparse requests cost what dense "
        "ones do.",
        "percentunit",
        {
            "{{instance}} used": chosen("instance:ambidex_experts_activated:ratio_rate5m"),
            "{{instance}} read": chosen("instance:ambidex_experts_loaded:ratio_rate5m"),
        },
    )
    yield graph(
        "Union of experts by batch size",
        "Share of the experts that a decoding step without dense requests reads, by its number of "
        "requests (up to).",
        "percentunit",
        {"{{batch}}": union},
    )
    yield graph(
        "Speed against dense by batch size",
        "Mean time of a dense decoding step over that of a sparse one with as many requests (up "
        "to). Needs dense traffic beside the sparse, as canary requests are.",
        "none",
        {"{{batch}}": speedup},
    )
    yield listing(
        "Decoding steps by batch size",
        "Over 30 minutes: mean time of a step whose requests are all dense, all sparse, or "
        "mixed; dense over sparse; and the share of the experts that sparse ones read.",
        {
            "Dense": ("s", step("dense")),
            "Mixed": ("s", step("mixed")),
            "Sparse": ("s", step("sparse")),
            "Speed-up": ("none", speedup),
            "Experts read": ("percentunit", union),
        },
        [],
        batch="Requests, up to",
    )
    yield distribution(
        "Activated share of finished requests",
        "How the requests' shares of activated experts spread: a band for each policy in use.",
        "percentunit",
        "ambidex_request_activated_ratio",
    ).span(12)


def changes() -> Iterator[Panel]:
    yield graph(
        "Servers by checkpoint",
        "How many servers serve which weights. Two bands are a rollout; AmbidexMixedCheckpoints "
        "fires when it does not end.",
        "none",
        {
            "{{name}} {{fingerprint}}": "count by (name, fingerprint) "
            f"({chosen('ambidex_model_info')})"
        },
        stacked=True,
    )
    yield graph(
        "Age of the weights",
        "Time since the checkpoint began to serve.",
        "dtdurations",
        {"{{instance}}": f"time() - {chosen('ambidex_model_loaded_timestamp_seconds')}"},
    )
    yield graph(
        "Reloads",
        "Checkpoints taken and refused, in the interval.",
        "none",
        {"{{result}}": increase("ambidex_reloads_total", "result", 'result!="unchanged"')},
    )
    yield graph(
        "Failed steps and replaced engines",
        "In the interval. A step that raises ends its batch with errors; an engine that keeps "
        "failing, or hangs, is replaced.",
        "none",
        {
            "{{instance}} steps": increase("ambidex_failed_steps_total", "instance"),
            "{{instance}} engines": increase("ambidex_engine_restarts_total", "instance"),
        },
    )
    yield graph(
        "Ready, retiring",
        "1 while a server takes requests; and replaced engines that still finish what they have.",
        "none",
        {
            "{{instance}} ready": chosen("ambidex_ready"),
            "{{instance}} retiring": chosen("ambidex_engines_retiring"),
        },
    )
    yield graph(
        "Uptime",
        "Time since the process began; a saw is a server that restarts again and again.",
        "dtdurations",
        {"{{instance}}": f"time() - {chosen('process_start_time_seconds', JOB)}"},
    )
