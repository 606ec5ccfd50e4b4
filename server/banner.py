"""What a server says when it starts: how loading goes, what is served, within which limits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from engine.model.attention import KVCache
from engine.serving.engine import Engine
from server.generation import Frontend
from server.memory import available_bytes
from server.settings import Settings


@contextmanager
def phase(console: Console, text: str) -> Iterator[None]:
    """Show what is being done, on a terminal with a spinner, and how long it took."""
    started = time.perf_counter()
    with console.status(text):  # which shows nothing where there is no terminal
        yield
    seconds = time.perf_counter() - started
    console.print(f"{text}: {seconds:.1f} s", markup=False, highlight=False, soft_wrap=True)


def banner(frontend: Frontend, address: str, *, as_table: bool = True) -> RenderableType:
    """What is served, where, and within which limits; plain lines unless `as_table`."""
    rows = _rows(frontend, address)
    if not as_table:
        return Text("\n".join(f"{name}: {value}" for name, value in rows.items()))
    table = Table(title="Ambidex", show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, Text(value))  # not markup: a path may have brackets
    return table


def _rows(frontend: Frontend, address: str) -> dict[str, str]:
    engine, settings = frontend.engine, frontend.settings
    model = engine.model_config
    experts = model.experts
    return {
        "model": f"{engine.checkpoint.path} ({engine.checkpoint.fingerprint[:12]})",
        "parameters": f"{model.num_parameters:,} in {model.num_hidden_layers} layers",
        "experts": f"{experts.num_experts} a layer, {experts.expert_size} neurons each, "
        f"default {experts.default_policy}",
        "device": f"{settings.device}, {frontend.dtype}",
        "memory": _memory(engine, settings),
        "KV cache": f"{engine.num_blocks} blocks of {engine.config.block_size} tokens, at most "
        f"{_size(settings.kv_cache_bytes)} (AMBIDEX_KV_CACHE_BYTES)",
        "limits": f"{frontend.max_input_tokens} input, {frontend.max_total_tokens} total tokens; "
        f"{settings.max_num_seqs} running, {settings.max_waiting} waiting, "
        f"{settings.max_concurrent_requests} concurrent requests",
        "deadline": f"{settings.request_timeout:g} s, at most {settings.max_request_timeout:g} s "
        "by X-Request-Timeout",
        "access": _access(settings),
        "checkpoints": f"watching {settings.watch} every {settings.watch_interval:g} s"
        if settings.watch
        else "not watched (AMBIDEX_WATCH)",
        "address": f"{address} (documentation at /docs)",
    }


def _memory(engine: Engine, settings: Settings) -> str:
    model, dtype = engine.model_config, engine.checkpoint.model.embedding.weight.dtype
    weights = model.num_parameters * dtype.itemsize
    cache = engine.num_blocks * KVCache.bytes_per_block(
        model.num_hidden_layers,
        engine.config.block_size,
        model.num_key_value_heads,
        model.head_dim,
        dtype,
    )
    left = available_bytes(settings.device)
    rest = "" if left is None else f"; {_size(left)} left on this {settings.device}"
    return f"weights {_size(weights)}, KV cache {_size(cache)}{rest}"


def _access(settings: Settings) -> str:
    keys = len(settings.keyring().keys)
    limits = {"requests": settings.requests_per_minute, "tokens": settings.tokens_per_minute}
    said = [f"{keys} API keys" if keys else "open: no API keys (AMBIDEX_API_KEYS)"]
    said += ["admin key" if settings.admin_key else "admin routes closed"]
    said += [f"{limit} {what} a minute and key" for what, limit in limits.items() if limit]
    return ", ".join(said)


def _size(count: float) -> str:
    return f"{count / (1 << 20):,.0f} MiB"
