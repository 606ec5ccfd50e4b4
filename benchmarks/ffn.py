"""The expert FFN on the CPU: time per layer, sparse beside dense, in one run.

    GOMP_SPINCOUNT=20000 python benchmarks/ffn.py [--json FILE]

Dense and sparse are the engine's own, both with packed weights; `eager` is relu(F.linear(x, up))
through F.linear(h, down.T) in PyTorch, to show what packing brings. Two routings bound what real
ones do: `same`, where all tokens of a batch choose the same experts, and `random`, where every
token chooses for itself. Layers rotate, each with its own choice, until the chosen weights alone
exceed the last cache twice: weights come from memory, as they do in a model.

Rivals take turns, round after round, and the median round counts. On Linux, rounds in which other
processes took more than a tenth of a core are repeated, up to a limit; results of a machine that
never calmed down are marked with a star and `"calm": false`.

GOMP_SPINCOUNT lets idle threads of the GNU OpenMP runtime wait briefly for the next operator
instead of sleeping at once; it must be set before Python starts, and helps every mode.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.records import Record, _processor, write_records
from engine.kernels.cpu_ffn import PackedExpertFFN
from engine.kernels.cpu_linear import best_path


@dataclass(frozen=True)
class Size:
    """One FFN shape and how many of its experts a token chooses."""

    model: int
    neurons: int
    experts: int
    chosen: int

    def __str__(self) -> str:
        return f"{self.model}/{self.neurons} {self.chosen} of {self.experts}"


SIZES = (Size(256, 1024, 64, 8), Size(768, 3072, 32, 6), Size(2048, 8192, 32, 6))
TOKENS = (1, 4, 16, 64, 256)
DTYPES = ("float32", "bfloat16")
ROUNDS = 11
MAX_LAYERS = 512

Call = Callable[[int], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call of each rival, and whether other processes kept away."""

    ms: dict[str, float]
    calm: bool


def run(
    sizes: Sequence[Size] = SIZES,
    tokens: Sequence[int] = TOKENS,
    dtypes: Sequence[str] = DTYPES,
    rounds: int = ROUNDS,
    patience: float = 20.0,
) -> list[Record]:
    """Measure every combination and return one record per number, ready for JSON.

    `patience` is how many seconds per combination may go into repeating disturbed rounds.
    """
    records: list[Record] = []
    with torch.inference_mode():
        for size in sizes:
            for dtype in dtypes:
                bench = Bench(size, getattr(torch, dtype))
                for count in tokens:
                    records += bench.measure(count, rounds, patience)
    return records


class Bench:
    """Enough layers of one size and type that their weights cannot stay in the cache."""

    def __init__(self, size: Size, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.size, self.dtype = size, dtype
        self.expert_bytes = 2 * size.model * (size.neurons // size.experts) * dtype.itemsize
        up_FD = torch.randn(size.neurons, size.model).div_(size.model**0.5).to(dtype)
        down_FD = torch.randn(size.neurons, size.model).div_(size.neurons**0.5).to(dtype)
        wanted = -(-2 * last_cache_bytes() // (size.chosen * self.expert_bytes))
        self.layers = [
            PackedExpertFFN(up_FD, down_FD, size.experts)
            for _ in range(max(2, min(MAX_LAYERS, wanted)))
        ]
        copies = max(2, -(-4 * last_cache_bytes() // (size.experts * self.expert_bytes)))
        self.eager = [(up_FD.clone(), down_FD.t().contiguous()) for _ in range(copies)]

    def measure(self, tokens: int, rounds: int, patience: float) -> list[Record]:
        x_TD = torch.randn(tokens, self.size.model).to(self.dtype)
        choices = {
            "same": [self._same(tokens) for _ in self.layers],
            "random": [self._random(tokens) for _ in self.layers],
        }
        rivals: dict[str, Call] = {"dense": lambda i: self.layers[i].dense(x_TD)}
        for name, chosen in choices.items():
            rivals[name] = self._sparse(x_TD, chosen)
        slow_bf16 = self.dtype == torch.bfloat16 and best_path(self.dtype) == "widen"
        if not slow_bf16 or tokens <= 4:  # beyond, eager takes up to seconds per layer
            rivals["eager"] = self._eager(x_TD)
        timing = race(rivals, len(self.layers), rounds, patience)
        return list(self._records(tokens, timing, choices))

    def _sparse(self, x_TD: Tensor, chosen: list[Tensor]) -> Call:
        return lambda i: self.layers[i].sparse(x_TD, chosen[i])

    def _same(self, tokens: int) -> Tensor:
        return self._random(1).expand(tokens, -1).contiguous()

    def _random(self, tokens: int) -> Tensor:
        order_TE = torch.rand(tokens, self.size.experts).argsort(1)
        return order_TE < self.size.chosen

    def _eager(self, x_TD: Tensor) -> Call:
        def call(i: int) -> Tensor:
            up_FD, down_DF = self.eager[i % len(self.eager)]
            return F.linear(F.linear(x_TD, up_FD).relu_(), down_DF)

        return call

    def _records(
        self, tokens: int, timing: Timing, choices: dict[str, list[Tensor]]
    ) -> Iterator[Record]:
        E = self.size.experts
        yield self._record("cpu_ffn_dense", tokens, "all", E, timing)
        for routing, chosen in choices.items():
            union = int(chosen[0].any(0).sum())
            yield self._record("cpu_ffn_sparse", tokens, routing, union, timing)

    def _record(self, name: str, tokens: int, routing: str, union: int, timing: Timing) -> Record:
        size, ffn = self.size, self.layers[0]
        value = timing.ms["dense" if routing == "all" else routing]
        peer = timing.ms.get("eager" if routing == "all" else "dense")
        sparse_way = ffn.sparse_way(tokens, tokens * size.chosen, union)
        params = {
            "d_model": size.model,
            "d_ff": size.neurons,
            "experts": size.experts,
            "chosen": size.experts if routing == "all" else size.chosen,
            "tokens": tokens,
            "dtype": str(self.dtype).removeprefix("torch."),
            "routing": routing,
            "experts_in_use": union,
            "path": ffn.path,
            "way": ffn.dense_way(tokens) if routing == "all" else sparse_way,
            "layers_rotated": len(self.layers),
            "gb_per_s": round(union * self.expert_bytes / value / 1e6, 2),
            "calm": timing.calm,
            "threads": torch.get_num_threads(),
            "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
        }
        rounded = None if peer is None else round(peer, 5)
        ratio = None if peer is None else round(peer / value, 3)
        return Record(name, params, round(value, 5), "ms", rounded, ratio, machine=cpu())


def race(rivals: dict[str, Call], layers: int, rounds: int, patience: float) -> Timing:
    """Let the rivals take turns over all layers; the median of the undisturbed rounds."""
    undisturbed: list[dict[str, float]] = []
    every: list[dict[str, float]] = []
    _round(rivals, layers)  # warm-up
    deadline = None
    while len(undisturbed) < rounds:
        others = _OtherProcesses()
        result = _round(rivals, layers)
        every.append(result)
        if not others.disturbed():
            undisturbed.append(result)
        elif len(every) >= rounds:
            deadline = deadline or time.monotonic() + patience
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
    calm = len(undisturbed) >= min(3, rounds)
    kept = undisturbed if calm else every
    return Timing({name: statistics.median(r[name] for r in kept) for name in rivals}, calm)


def _round(rivals: dict[str, Call], layers: int) -> dict[str, float]:
    result = {}
    for name, call in rivals.items():
        start = time.perf_counter()
        for i in range(layers):
            call(i)
        result[name] = (time.perf_counter() - start) / layers * 1e3
    return result


class _OtherProcesses:
    """How much processor time others take between construction and `disturbed()`."""

    def __init__(self) -> None:
        self._wall, self._busy, self._own = time.monotonic(), _busy_seconds(), _own_seconds()

    def disturbed(self) -> bool:
        wall = time.monotonic() - self._wall
        others = (_busy_seconds() - self._busy) - (_own_seconds() - self._own)
        # /proc/stat counts in hundredths of a second: forgive two of them.
        return others > 0.1 * wall + 0.02


def _busy_seconds() -> float:
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    idle = int(fields[3]) + int(fields[4])
    return float(sum(map(int, fields[:8])) - idle) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    taken = os.times()
    return taken.user + taken.system


def last_cache_bytes() -> int:
    """The size of the largest cache level that Linux reports; 32 MiB elsewhere."""
    found = [32 << 20]
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()
        found.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(found)


def cpu() -> str:
    """The processor the numbers depend on, also where an accelerator is the machine's name."""
    capability = torch.backends.cpu.get_cpu_capability()
    products = "with" if best_path(torch.bfloat16) == "onednn" else "without"
    return f"{_processor()}, {os.cpu_count()} CPUs, {capability} {products} bfloat16 products"


HEADER = (
    "size", "dtype", "tokens", "eager", "dense", "GB/s", "same", "GB/s", "dense/same", "random",
    "GB/s", "dense/random", "ways (dense, same, random)",
)  # fmt: skip


def table(records: Sequence[Record]) -> str:
    """One aligned row per size, type and token count; times in milliseconds."""
    rows: list[tuple[str, ...]] = [HEADER]
    for dense, same, rand in zip(records[::3], records[1::3], records[2::3], strict=True):
        p = same.params
        size = Size(p["d_model"], p["d_ff"], p["experts"], p["chosen"])
        eager = dense.peer_value
        rows.append(
            (
                f"{size}",
                p["dtype"],
                f"{p['tokens']}" + ("" if p["calm"] else "*"),
                "-" if eager is None else f"{eager:.3f}",
                *_time_and_rate(dense),
                *_time_and_rate(same),
                f"{same.ratio:.2f}",
                *_time_and_rate(rand),
                f"{rand.ratio:.2f}",
                ", ".join(r.params["way"] for r in (dense, same, rand)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in rows)


def _time_and_rate(record: Record) -> tuple[str, str]:
    return f"{record.value:.3f}", f"{record.params['gb_per_s']:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=int, nargs="*", help="only these widths (256 768 2048)")
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--patience", type=float, default=20.0, help="seconds to wait for calm")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the records to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    sizes = [s for s in SIZES if not options.model or s.model in options.model]
    records = run(sizes, options.tokens, options.dtypes, options.rounds, options.patience)
    print(f"{cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(table(records))
    if options.json:
        write_records(options.json, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
