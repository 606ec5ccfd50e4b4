"""`/health`, `/info`, `/metrics`, `/version`, and the documentation."""

from __future__ import annotations

import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.version import VERSION
from server.settings import Settings
from tests.waiting import wait_for

if TYPE_CHECKING:
    from tests.server.conftest import Live, Serve


def test_health_of_a_healthy_server(live: Live) -> None:
    response = live.http.get("/health")
    assert response.status_code == 200
    assert response.json() == {"status": "ok"}


def test_version(live: Live) -> None:
    assert live.http.get("/version").json() == {"version": VERSION}


def test_info(live: Live) -> None:
    info = live.http.get("/info").json()
    assert info["model_id"] == "tiny"
    assert info["model_sha"] == live.engine.checkpoint.fingerprint
    assert info["model_dtype"] == "float32"
    assert info["model_device_type"] == "cpu"
    assert info["model_pipeline_tag"] == "text-generation"
    assert info["model_parameters"] == live.engine.model_config.num_parameters
    assert info["num_layers"] == 2
    assert info["experts"] == {
        "num_experts": 8,
        "expert_size": 8,
        "default_policy": "top_k:4",
        "quality": [{"top_k": 4, "share": 0.5, "perplexity": 20.0, "relative": 0.01}],
    }
    assert info["max_total_tokens"] == 4096
    assert info["max_input_tokens"] == 4095
    assert info["max_best_of"] == 1
    assert info["version"] == VERSION
    assert "/" not in info["model_id"]


def test_metrics_equal_what_the_responses_reported(serve: Serve) -> None:
    with serve() as live:
        answers = [
            live.post("/generate", "x" * n, max_new_tokens=n, details=True, experts=experts)
            for n, experts in ((3, "dense"), (5, "top_k:2"), (7, {"mass": 0.5}))
        ]
        last = live.stream("yy", max_new_tokens=4, experts="top_k:1")[-1]
        live.wait_until_idle()
        metrics = live.metrics()

    details = [a.json()["details"] for a in answers] + [last["details"]]
    experts = [d["experts"] for d in details]
    layers = [f'{{layer="{i}"}}' for i in range(2)]

    def total(name: str) -> float:
        return sum(metrics[f"ambidex_{name}_total{layer}"] for layer in layers)

    assert total("experts_activated") == sum(e["activated"] for e in experts)
    assert total("experts_available") == sum(e["available"] for e in experts)
    assert 0 < total("experts_loaded") <= total("experts_loadable")
    assert total("experts_loadable") == 2 * 8 * metrics["ambidex_steps_total"]
    generated = sum(d["generated_tokens"] for d in details)
    assert metrics["ambidex_generated_tokens_total"] == generated == 3 + 5 + 7 + 4
    assert metrics["ambidex_prompt_tokens_total"] == 3 + 5 + 7 + 2
    assert metrics['ambidex_requests_total{reason="length"}'] == 4
    for name in (
        *("request_activated_ratio", "time_to_first_token_seconds", "request_queue_seconds"),
        *("request_prefill_seconds", "request_decode_seconds", "request_seconds"),
        *("request_prompt_tokens", "request_generated_tokens"),
    ):
        assert metrics[f"ambidex_{name}_count"] == 4
        assert metrics[f'ambidex_{name}_bucket{{le="+Inf"}}'] == 4
    ratios = sum(e["activated_ratio"] for e in experts)
    assert math.isclose(metrics["ambidex_request_activated_ratio_sum"], ratios)
    assert metrics["ambidex_request_generated_tokens_sum"] == generated
    assert metrics["ambidex_inter_token_seconds_count"] == generated - 4
    assert metrics["ambidex_batch_tokens_count"] == metrics["ambidex_steps_total"]
    assert metrics["ambidex_batch_requests_count"] == metrics["ambidex_steps_total"]
    assert metrics["ambidex_batch_requests_sum"] == generated  # one chunk each, then decodes
    assert total("neurons_activated") == 8 * total("experts_activated")
    assert total("neurons_available") == 8 * total("experts_available")
    assert metrics["ambidex_ready"] == 1
    assert metrics["ambidex_live"] == 1
    assert metrics["process_resident_memory_bytes"] > 0


def test_decoding_by_experts_and_batch(serve: Serve) -> None:
    """Steps of one token each, by what they ran: alone, together alike, and mixed."""
    together = [("dense", 30), ("dense", 30), ("dense", 30)], [("dense", 30), ("top_k:2", 30)]
    with serve(step_seconds=0.02, sample_every=0) as live, ThreadPoolExecutor(3) as pool:
        for requests in ([("top_k:2", 5)], [("dense", 4)], *together):

            def ask(request: tuple[str, int]) -> Any:
                return live.generate("xx", max_new_tokens=request[1], experts=request[0])

            list(pool.map(ask, requests))
        live.wait_until_idle()
        metrics = live.metrics()

    def value(name: str, experts: str, batch: int) -> float:
        return metrics[f'ambidex_{name}{{batch="{batch}",experts="{experts}"}}']

    assert value("decode_step_seconds_count", "sparse", 1) >= 4  # the first token is the prompt's
    assert value("decode_step_seconds_count", "dense", 4) >= 20  # three requests
    assert value("decode_step_seconds_count", "mixed", 2) >= 20
    assert 0 < value("decode_step_seconds_sum", "sparse", 1) < 5
    steps = value("decode_step_seconds_count", "sparse", 1)
    assert value("decode_experts_loadable_total", "sparse", 1) == steps * 2 * 8
    assert value("decode_experts_loaded_total", "sparse", 1) == steps * 2 * 2
    for batch in (1, 4):
        every = value("decode_experts_loadable_total", "dense", batch)
        assert value("decode_experts_loaded_total", "dense", batch) == every
    counts = [v for k, v in metrics.items() if k.startswith("ambidex_decode_step_seconds_count")]
    assert sum(counts) < metrics["ambidex_steps_total"]  # prompts are no decoding


def test_sampled_steps_do_not_count_as_decoding(serve: Serve) -> None:
    with serve(sample_every=1) as live:
        live.generate(max_new_tokens=5, experts="top_k:2")
        assert not [name for name in live.metrics() if "ambidex_decode_" in name]


def test_prefix_cache_metrics(serve: Serve) -> None:
    """The second prompt finds the first's two full blocks; another policy finds nothing."""
    with serve(block_size=4) as live:
        for prompt, experts in (("x" * 11, "dense"), ("x" * 11, "dense"), ("x" * 11, "top_k:2")):
            live.post("/generate", prompt, max_new_tokens=1, experts=experts)
        live.wait_until_idle()
        metrics = live.metrics()
    assert metrics["ambidex_prefix_cache_queried_tokens_total"] == 33
    assert metrics["ambidex_prefix_cache_hit_tokens_total"] == 8


def test_gauges_while_requests_run_and_wait(serve: Serve) -> None:
    with serve(step_seconds=0.01, max_num_seqs=1) as live, ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(live.generate, "x" * 40, max_new_tokens=100) for _ in range(3)]
        deadline = time.monotonic() + 120
        while (metrics := live.metrics())["ambidex_requests_waiting"] < 2:
            assert time.monotonic() < deadline
        assert metrics["ambidex_requests_running"] == 1
        assert metrics["ambidex_http_requests_active"] == 3
        assert metrics["ambidex_kv_blocks_used"] >= 3
        share = metrics["ambidex_kv_blocks_used"] / metrics["ambidex_kv_blocks"]
        assert metrics["ambidex_kv_used_ratio"] == share
        for answer in answers:
            answer.result(60)
        live.wait_until_idle()
        assert live.metrics()["ambidex_kv_used_ratio"] == 0


def test_the_lag_of_the_event_loop_is_measured(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as live:
        original = live.frontend.numbers

        def slow() -> Any:
            time.sleep(0.3)  # in the loop: what must never happen
            return original()

        monkeypatch.setattr(live.frontend, "numbers", slow)
        live.metrics()
        monkeypatch.undo()
        name = "ambidex_event_loop_lag_seconds"

        def late() -> float:
            metrics = live.metrics()
            return metrics[f"{name}_count"] - metrics[f'{name}_bucket{{le="0.1"}}']

        wait_for(lambda: late() >= 1)
        wait_for(lambda: live.metrics()[f"{name}_count"] >= 2)
        metrics = live.metrics()
    assert metrics[f"{name}_sum"] >= 0.1


def test_router_metrics_of_sampled_steps(serve: Serve) -> None:
    """Every second step is sampled; what is exported is what the engine counted."""
    with serve(sample_every=2, expert_load=True) as live:
        live.generate("hello", max_new_tokens=9, experts="top_k:2")
        live.wait_until_idle()
        metrics, numbers = live.metrics(), live.frontend.numbers()
    assert metrics["ambidex_sampled_steps_total"] == 4  # of 9
    for layer in range(2):
        label = f'{{layer="{layer}"}}'
        assert metrics[f"ambidex_neurons_sampled_total{label}"] == 4 * 64  # one token a step
        assert 0 < metrics[f"ambidex_neurons_fired_total{label}"] < 4 * 64
        captured = metrics[f"ambidex_router_captured_mass_total{label}"]
        assert captured == numbers.mass_captured[layer]
        assert 0 < captured < metrics[f"ambidex_router_true_mass_total{label}"]
        load = [
            metrics[f'ambidex_expert_load_total{{expert="{e}",layer="{layer}"}}'] for e in range(8)
        ]
        assert load == numbers.expert_load[layer]
        assert sum(load) == 4 * 2


def test_the_load_of_experts_is_not_exported_unless_asked(serve: Serve) -> None:
    with serve(sample_every=1) as live:
        live.generate(max_new_tokens=3)
        assert not [name for name in live.metrics() if "expert_load" in name]


def test_metrics_keep_the_rules_of_prometheus(live: Live) -> None:
    live.generate(max_new_tokens=2)
    response = live.http.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(response.text))
    names = [f.name for f in families]
    assert len(names) == len(set(names))
    for family in families:
        assert family.name.startswith(("ambidex_", "process_"))
        assert family.documentation
        if family.type == "histogram":
            check_histogram(family)


def check_histogram(family: Any) -> None:
    buckets = [s for s in family.samples if s.name.endswith("_bucket")]
    bounds = [float(s.labels["le"]) for s in buckets]
    counts = [s.value for s in buckets]
    assert bounds == sorted(set(bounds))
    assert bounds[-1] == math.inf
    assert counts == sorted(counts)
    assert counts[-1] == next(s.value for s in family.samples if s.name.endswith("_count"))


def test_reasons_exist_before_they_occur(serve: Serve) -> None:
    with serve() as live:
        metrics = live.metrics()
    for reason in ("length", "eos_token", "stop_sequence", "abort", "error"):
        assert metrics[f'ambidex_requests_total{{reason="{reason}"}}'] == 0
    for reason in ("invalid", "overloaded", "stopped"):
        assert metrics[f'ambidex_rejections_total{{reason="{reason}"}}'] == 0


def test_the_documentation_describes_every_field(live: Live) -> None:
    assert live.http.get("/docs").status_code == 200
    document = live.http.get("/openapi.json").json()
    assert set(document["paths"]) == {
        *("/", "/generate", "/generate_stream", "/health", "/info", "/metrics", "/version"),
        *("/health/live", "/health/ready", "/admin/status", "/admin/reload"),
        *("/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{name}"),
        *("/tokenize", "/detokenize", "/tokenizer_info"),
    }
    for operations in document["paths"].values():
        for operation in operations.values():
            assert operation["summary"]
            assert operation["description"]
    schemas = document["components"]["schemas"]
    for name, schema in schemas.items():
        for field, description in schema["properties"].items():
            assert description.get("description"), f"{name}.{field}"
    parameters = schemas["GenerateParameters"]
    assert parameters["additionalProperties"] is False
    assert set(parameters["properties"]) == {
        *("best_of", "decoder_input_details", "details", "details_experts", "do_sample", "experts"),
        *("frequency_penalty", "grammar", "max_new_tokens", "repetition_penalty"),
        *("return_full_text", "seed", "stop", "temperature", "top_k", "top_n_tokens", "top_p"),
        *("truncate", "typical_p", "watermark"),
    }
    assert {"StreamEvent", "ChatChunk"} <= set(schemas)
    assert schemas["GenerateRequest"]["examples"]


def test_the_example_of_the_documentation_works(live: Live) -> None:
    schemas = live.http.get("/openapi.json").json()["components"]["schemas"]
    for name, path in (
        ("GenerateRequest", "/generate"),
        ("RootRequest", "/"),
        ("CompletionRequest", "/v1/completions"),
        ("ChatRequest", "/v1/chat/completions"),
    ):
        for example in schemas[name]["examples"]:
            assert live.http.post(path, json=example).status_code == 200


def test_the_handbook_names_every_setting_and_metric(serve: Serve) -> None:
    docs = Path(__file__).parents[3] / "docs"
    settings, metrics = ((docs / f"{n}.md").read_text() for n in ("serving", "metrics"))
    for name, setting in Settings.model_fields.items():
        (row,) = re.findall(rf"^\| `AMBIDEX_{name.upper()}` \| (.*) \| (.*) \|$", settings, re.M)
        assert row[1] == setting.description
        if isinstance(setting.default, int | float):
            assert float(row[0].replace("true", "1").replace("false", "0")) == setting.default
    with serve(expert_load=True) as live:
        families = list(live.frontend.registry.collect())
    for family in families:
        assert f"`{family.name}" in metrics, family.name
