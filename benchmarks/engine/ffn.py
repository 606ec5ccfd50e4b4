"""One feed-forward layer on the CPU, sparse against dense, as the engine runs it.

    ambidex bench ffn [--json FILE]

Both sides are the engine's own `ExpertFFN`, weights prepacked; sparse includes the router and the
choice of experts. Two routings bound what real text does: all tokens of the batch choose the same 6
of 32 experts, or each token its own. Enough layers take turns that their weights do not stay in the
cache. Dense and both sparse runs alternate layer by layer, and the median over all of them counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from benchmarks.records import MACHINE, VERSIONS, Record, write_records
from engine.config import ExpertConfig, ModelConfig
from engine.cpu.pack import PackedFFN
from engine.model.ffn import ExpertFFN
from engine.model.policy_batch import PolicyBatch
from engine.policy import ExpertPolicy

SIZES: Final = ((768, 3072), (2048, 8192))
TOKENS: Final = (1, 4, 16, 256)
DTYPES: Final = (torch.float32, torch.bfloat16)
EXPERTS: Final = 32
CHOSEN: Final = 6
CACHE_BYTES: Final = 256 << 20  # weights in rotation: several times any cache of today
SECONDS_PER_ROW: Final = 3.0
MIN_SAMPLES, MAX_SAMPLES = 9, 301


def build_layer(width: int, neurons: int, dtype: torch.dtype) -> PackedFFN:
    """A layer with random weights, ready for inference."""
    config = ModelConfig(
        vocab_size=2,
        hidden_size=width,
        intermediate_size=neurons,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=1,
        experts=ExpertConfig(EXPERTS, neurons // EXPERTS),
    )
    layer = ExpertFFN(config).requires_grad_(False)
    torch.nn.init.normal_(layer.up, std=width**-0.5)
    torch.nn.init.normal_(layer.down, std=neurons**-0.5)
    layer.up.data, layer.down.data = layer.up.to(dtype), layer.down.to(dtype)
    torch.nn.init.normal_(layer.router, std=width**-0.5)
    return PackedFFN(layer)


def inputs(width: int, tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random inputs [T, D] under which tokens choose the same experts, or each its own."""
    same = torch.randn(1, width) + 1e-3 * torch.randn(tokens, width)
    return {"same": same.to(dtype), "own": torch.randn(tokens, width).to(dtype)}


def milliseconds(layer: PackedFFN, x_TD: Tensor, policy: PolicyBatch) -> float:
    start = time.perf_counter()
    layer(x_TD, policy)
    return (time.perf_counter() - start) * 1e3


def measure(layers: Sequence[PackedFFN], tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """Median milliseconds of a layer: dense, and sparse under both routings."""
    width = layers[0].router.shape[1]  # `up` is packed by now
    batches = inputs(width, tokens, dtype)
    dense = PolicyBatch.uniform(ExpertPolicy.dense(), tokens, EXPERTS)
    sparse = PolicyBatch.uniform(ExpertPolicy.top_k(CHOSEN), tokens, EXPERTS)
    samples: dict[str, list[float]] = {"dense": [], "same": [], "own": []}
    deadline = time.perf_counter() + SECONDS_PER_ROW
    rounds = 0
    while rounds < MIN_SAMPLES + 2 or (rounds < MAX_SAMPLES and time.perf_counter() < deadline):
        # Different layers for the three, so that none finds its weights in the cache.
        for offset, name in enumerate(samples):
            layer = layers[(rounds * 3 + offset) % len(layers)]
            x_TD = batches.get(name, batches["own"])
            elapsed = milliseconds(layer, x_TD, dense if name == "dense" else sparse)
            if rounds >= 2:  # warm-up
                samples[name].append(elapsed)
        rounds += 1
    return {name: statistics.median(values) for name, values in samples.items()}


@torch.inference_mode()
def rows(
    sizes: Sequence[tuple[int, int]] = SIZES,
    tokens: Sequence[int] = TOKENS,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> Iterator[tuple[Record, Record]]:
    """Records of each size, type and number of tokens: the same experts, and each token its own."""
    for width, neurons in sizes:
        for dtype in dtypes:
            layer_bytes = 2 * width * neurons * dtype.itemsize
            count = max(4, -(-CACHE_BYTES // layer_bytes))
            layers = [build_layer(width, neurons, dtype) for _ in range(count)]
            for batch in tokens:
                yield _records(width, neurons, dtype, batch, measure(layers, batch, dtype))


def _records(
    width: int, neurons: int, dtype: torch.dtype, tokens: int, times: dict[str, float]
) -> tuple[Record, Record]:
    def record(routing: str) -> Record:
        params = {
            "D": width,
            "F": neurons,
            "E": EXPERTS,
            "k": CHOSEN,
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": tokens,
            "routing": routing,
            "threads": torch.get_num_threads(),
        }
        ratio = times["dense"] / times[routing]
        return Record("ffn", params, times[routing], "ms", times["dense"], ratio)

    return record("same"), record("own")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; with --json, keep the records."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the records to this file")
    path: Path | None = parser.parse_args(arguments).json
    torch.manual_seed(0)
    print(f"{MACHINE}, {torch.get_num_threads()} threads, torch {VERSIONS['torch']}")
    print(f"one layer, {CHOSEN} of {EXPERTS} experts; milliseconds, and times faster than dense")
    print(
        f"{'width':>6}{'type':>10}{'tokens':>8}{'dense':>10}"
        f"{'sparse, same experts':>26}{'sparse, own experts':>26}"
    )
    records: list[Record] = []
    for same, own in rows():
        records += (same, own)
        print(
            f"{same.params['D']:>6}{same.params['dtype']:>10}{same.params['tokens']:>8}"
            f"{same.peer_value:>10.3f}{same.value:>17.3f} {same.ratio:>7.2f}x"
            f"{own.value:>17.3f} {own.ratio:>7.2f}x",
            flush=True,
        )
    if path is not None:
        write_records(path, records)


if __name__ == "__main__":
    main()
