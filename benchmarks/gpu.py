"""The sparse FFN's kernels on a GPU: correct against their references first, then timed.

    python -m benchmarks.gpu [--section kernels|training|all] [--json FILE]

Every time is of work replayed from a CUDA graph, which is how the engine decodes: no launch waits
for Python, on our side or the peer's. A graph holds one call on each of enough weight sets to
exceed the L2 cache three times, so weights come from memory as they do in a model of many layers;
weights are random, never zeros. Rivals of one row are replayed in turn, round after round, and the
median round counts. Ceilings (copy bandwidth, dense product) are measured in the same run.

The peer is the dense FFN in PyTorch, relu(x @ up.T) @ down, over all neurons. A sparse row uses 6
of 32 experts, either the same 6 for all tokens ("shared") or drawn for each token by itself
("independent"): real routing lies between. Random activations silence half of the neurons, and the
few-token kernel does not read the rows of `down` of silenced neurons.

All this is the section `kernels`; `training` is benchmarks/gpu_training.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from benchmarks import gpu_training
from benchmarks.gpu_timing import Call, check, interleaved_us, relative_error
from benchmarks.records import MACHINE, VERSIONS, Record, write_records
from engine.kernels import expert_ffn, grouped_ffn, routing

SHAPES = ((768, 3072), (2048, 8192))
EXPERTS, CHOSEN = 32, 6
FEW, MANY = (1, 2, 4, 8, 16), (64, 512, 2048)
CROSSOVER = (8, 16, 32, 64)
L2_BYTES = 60e6


@dataclass(frozen=True)
class Problem:
    """Inputs of one shape: enough weight sets to miss the L2 cache, and one routing."""

    weights: list[tuple[Tensor, Tensor]]
    x_TD: Tensor
    routing: routing.Routing

    @property
    def expert_size(self) -> int:
        return int(self.weights[0][0].shape[0]) // EXPERTS

    def few(self, i: int) -> Tensor:
        up_FD, down_FD = self.weights[i % len(self.weights)]
        return expert_ffn.expert_ffn(
            self.x_TD, up_FD, down_FD, self.routing.ids_TK, self.expert_size, "relu"
        )

    def grouped(self, i: int) -> Tensor:
        up_FD, down_FD = self.weights[i % len(self.weights)]
        return grouped_ffn.grouped_ffn(self.x_TD, up_FD, down_FD, self.routing, "relu")

    def dense(self, i: int) -> Tensor:
        up_FD, down_FD = self.weights[i % len(self.weights)]
        return (self.x_TD @ up_FD.T).relu_() @ down_FD


def weight_sets(width: int, neurons: int) -> list[tuple[Tensor, Tensor]]:
    """Random [F, D] pairs whose chosen rows alone exceed the L2 cache three times."""
    used = 4 * width * neurons * CHOSEN / EXPERTS
    count = min(64, max(2, round(3 * L2_BYTES / used)))
    return [
        (
            torch.randn(neurons, width, device="cuda").bfloat16() / width**0.5,
            torch.randn(neurons, width, device="cuda").bfloat16() / neurons**0.5,
        )
        for _ in range(count)
    ]


def random_routing(tokens: int, kind: str) -> routing.Routing:
    """6 of 32 experts a token: drawn for each, or the same for all."""
    scores_TE = torch.randn(1 if kind == "shared" else tokens, EXPERTS, device="cuda")
    scores_TE = scores_TE.expand(tokens, EXPERTS).contiguous()
    return routing.route_scores_reference(scores_TE, *limits(tokens), CHOSEN)


def limits(tokens: int) -> tuple[Tensor, Tensor]:
    k_T = torch.full((tokens,), CHOSEN, dtype=torch.int32, device="cuda")
    return k_T, torch.full((tokens,), 2.0, device="cuda")


def problem(weights: list[tuple[Tensor, Tensor]], tokens: int, kind: str) -> Problem:
    x_TD = torch.randn(tokens, weights[0][0].shape[1], device="cuda").bfloat16()
    return Problem(weights, x_TD, random_routing(tokens, kind))


# --- correctness ---------------------------------------------------------------------------------


def check_ffn(width: int, neurons: int, tokens: int, dtype: torch.dtype) -> list[Record]:
    limit = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    x_TD = torch.randn(tokens, width, device="cuda").to(dtype)
    up_FD, down_FD = (
        (torch.randn(neurons, width, device="cuda") / width**0.5).to(dtype) for _ in range(2)
    )
    routed = random_routing(tokens, "independent")
    expected = grouped_ffn.grouped_ffn_reference(
        x_TD.double(), up_FD.double(), down_FD.double(), routed, "relu"
    )
    grouped = grouped_ffn.grouped_ffn(x_TD, up_FD, down_FD, routed, "relu")
    label = f"D={width} F={neurons} T={tokens} {str(dtype).removeprefix('torch.')}"
    found = [check(f"grouped_ffn {label}", relative_error(grouped, expected), limit)]
    if tokens <= max(CROSSOVER):
        few = expert_ffn.expert_ffn(x_TD, up_FD, down_FD, routed.ids_TK, neurons // EXPERTS, "relu")
        found.append(check(f"expert_ffn {label}", relative_error(few, expected), limit))
    return found


def check_routing(tokens: int, width: int, experts: int) -> Record:
    """Integer inputs make scores exact, so that the choice must be identical."""
    x_TD = torch.randint(-2, 3, (tokens, width), device="cuda").bfloat16()
    router_ED = torch.randint(-2, 3, (experts, width), device="cuda") / 16
    k_T = torch.randint(1, CHOSEN + 1, (tokens,), dtype=torch.int32, device="cuda")
    mass_T = torch.rand(tokens, device="cuda") * 1.5
    actual = routing.route(x_TD, router_ED, k_T, mass_T, CHOSEN)
    expected = routing.route_reference(x_TD, router_ED, k_T, mass_T, CHOSEN)
    again = routing.route(x_TD, router_ED, k_T, mass_T, CHOSEN)
    differing = [
        name
        for name, a, b, c in zip(actual._fields, actual, expected, again, strict=True)
        if not (torch.equal(a, b) and torch.equal(a, c))
    ]
    label = f"routing E={experts} D={width} T={tokens} differing fields {differing}"
    return check(label, float(len(differing)), 0.0)


def correctness() -> list[Record]:
    found = [
        check_routing(tokens, width, experts)
        for tokens in (1, 16, 65, 2048)
        for width, experts in ((100, 12), (768, 32), (2048, 32), (2048, 256))
    ]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width, neurons, tokens in (
            (100, 32 * 24, 1),
            (100, 32 * 24, 33),
            (768, 3072, 16),
            (2048, 8192, 8),
            (2048, 8192, 64),
            (2048, 8192, 700),
        ):
            found += check_ffn(width, neurons, tokens, dtype)
    return found


# --- measurements --------------------------------------------------------------------------------


def ceilings() -> list[Record]:
    """What this device copies and multiplies at most, as PyTorch reaches it.

    The copy is an elementwise kernel: replayed from a graph, `copy_` is slower than that.
    """
    source = torch.randn(2**28, device="cuda").bfloat16()
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    copy_us, product_us = interleaved_us(
        [lambda _: torch.neg(source, out=target), lambda _: torch.mm(a, b)], calls=4
    )
    bandwidth = 2 * source.numel() * 2 / copy_us / 1e6
    rate = 2 * 8192**3 / product_us / 1e6
    return [
        Record("ceiling copy bandwidth", {"bytes": source.numel() * 2}, bandwidth, "TB/s"),
        Record("ceiling dense product", {"n": 8192, "dtype": "bf16"}, rate, "TFLOP/s"),
    ]


def ffn_records(width: int, neurons: int) -> list[Record]:
    """Both kernels against the dense FFN, at the token counts they are for."""
    weights = weight_sets(width, neurons)
    found = []
    for kind in ("shared", "independent"):
        for tokens in sorted({*FEW, *MANY, *CROSSOVER}):
            case = problem(weights, tokens, kind)
            rivals: dict[str, Call] = {"dense": case.dense, "grouped_ffn": case.grouped}
            if tokens <= max(CROSSOVER):
                rivals["expert_ffn"] = case.few
            times = interleaved_us(list(rivals.values()), calls=len(weights))
            of = dict(zip(rivals, times, strict=True))
            params: dict[str, Any] = {
                "D": width,
                "F": neurons,
                "E": EXPERTS,
                "k": CHOSEN,
                "tokens": tokens,
            }
            params |= {"routing": kind, "dtype": "bf16"}
            found += [
                Record(name, params, of[name], "us", of["dense"], of["dense"] / of[name])
                for name in ("expert_ffn", "grouped_ffn")
                if name in of
            ]
    return found


def routing_records(width: int) -> list[Record]:
    """The whole routing, and the part that few tokens need; the peer is scores and top-k alone."""
    routers = [torch.randn(EXPERTS, width, device="cuda") / width**0.5 for _ in range(8)]
    found = []
    for tokens in (1, 16, *MANY):
        x_TD = torch.randn(tokens, width, device="cuda").bfloat16()
        k_T, mass_T = limits(tokens)

        def select(i: int, x_TD: Tensor = x_TD, k_T: Tensor = k_T, m: Tensor = mass_T) -> object:
            return routing.select(x_TD, routers[i % 8], k_T, m, CHOSEN)

        def route(i: int, x_TD: Tensor = x_TD, k_T: Tensor = k_T, m: Tensor = mass_T) -> object:
            return routing.route(x_TD, routers[i % 8], k_T, m, CHOSEN)

        def top_k(i: int, x_TD: Tensor = x_TD) -> object:
            return torch.topk(x_TD.float() @ routers[i % 8].T, CHOSEN)

        select_us, route_us, peer_us = interleaved_us([select, route, top_k], calls=16)
        params: dict[str, Any] = {
            "D": width,
            "E": EXPERTS,
            "k": CHOSEN,
            "tokens": tokens,
            "router": "fp32",
        }
        found += [
            Record("routing select", params, select_us, "us", peer_us, peer_us / select_us),
            Record("routing route", params, route_us, "us", peer_us, peer_us / route_us),
        ]
    return found


def crossovers(records: Sequence[Record]) -> list[Record]:
    """The most measured tokens at which the few-token kernel is still the faster of the two."""
    times = {(r.name, json.dumps(r.params)): r.value for r in records}
    faster: dict[tuple[int, str], int] = {}
    for record in records:
        key = json.dumps(record.params)
        if record.name == "expert_ffn" and record.value < times["grouped_ffn", key]:
            group = (record.params["D"], record.params["routing"])
            faster[group] = max(faster.get(group, 0), record.params["tokens"])
    return [
        Record("crossover: expert_ffn faster up to", {"D": d, "routing": kind}, tokens, "tokens")
        for (d, kind), tokens in faster.items()
    ]


# --- the report ----------------------------------------------------------------------------------


HEADER = f"{'measurement':<34} {'parameters':<44} {'value':>10} {'unit':<9}{'peer':>10}{'ratio':>8}"


def row(record: Record) -> str:
    params = " ".join(f"{k}={v}" for k, v in record.params.items() if k not in ("E", "k", "dtype"))
    peer = "" if record.peer_value is None else f"{record.peer_value:10.2f}"
    ratio = "" if record.ratio is None else f"{record.ratio:6.2f}x"
    return (
        f"{record.name:<34} {params:<44} {record.value:10.4g} {record.unit:<9}{peer:>10}{ratio:>8}"
    )


def measurements() -> Iterator[list[Record]]:
    """The section `kernels`, group by group, correctness first."""
    yield correctness()
    yield ceilings()
    for width, neurons in SHAPES:
        times = ffn_records(width, neurons)
        yield times
        yield crossovers(times)
    for width, _ in SHAPES:
        yield routing_records(width)


SECTIONS = {"kernels": measurements, "training": gpu_training.measurements}


def main() -> None:
    parser = argparse.ArgumentParser(description="Check and time the GPU kernels.")
    parser.add_argument("--section", choices=[*SECTIONS, "all"], default="all")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    arguments = parser.parse_args()
    path: Path | None = arguments.json
    chosen = [arguments.section] if arguments.section in SECTIONS else list(SECTIONS)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a CUDA device")
    torch.manual_seed(0)
    print(MACHINE, VERSIONS)
    print(HEADER)
    records: list[Record] = []
    for found in chain.from_iterable(SECTIONS[name]() for name in chosen):
        records += found
        print("\n".join(row(record) for record in found), flush=True)
    if path is not None:
        write_records(path, records)


if __name__ == "__main__":
    main()
