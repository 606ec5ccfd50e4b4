"""Which way computes a sparse FFN on a GPU, from shapes alone: nothing is asked of it.

- `few` reads the weights of each token-expert pair (`expert_ffn`);
- `union` reads those of each expert in use, and multiplies every token with them (`union_ffn`);
- `grouped` reads as much as `union`, and multiplies each token with its own experts
  (`grouped_ffn`);
- `masked` reads all, through dense products, and makes the choice meanwhile (`masked_ffn`).

The last never costs much more than the dense FFN, so neither does the cheapest of them.

Which experts a batch uses together is known to the device alone. The rule takes what independent
choices of k would give, unless the caller knows better from the steps before. Real choices share
experts, so a way that is predicted to be as fast as one that reads all is faster in truth, and wins
ties.

Shapes: T tokens, D model, E experts, S neurons per expert, k experts a token, P pairs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from engine.gpu.ffn.union_ffn import MOST_TOKENS as UNION_TOKENS


@dataclass(frozen=True)
class Rates:
    """What each way costs; times in microseconds, as replayed from a CUDA graph.

    Fitted to benchmarks/results/h100-engine.txt (H100, bfloat16). The rule compares ways on one
    device, so only ratios matter.
    """

    weight_bytes: float = 2.9e6  # per microsecond, reading each expert once
    pair_bytes: float = 3.4e6  # reading it again for each pair, in part from the cache
    dense_flops: float = 7.0e8  # per microsecond
    grouped_flops: float = 5.5e8
    few_launches: float = 6.5
    union_launches: float = 8.5
    grouped_launches: float = 9.0
    dense_launches: float = 8.0
    select: float = 4.0  # scores and choice
    select_token: float = 0.009  # more of it, for each token
    beside: float = 1.0  # the same beside a product that does not wait for it
    beside_token: float = 0.03  # what each token's takes from the product
    sort: float = 2.8  # pairs by expert
    sort_token: float = 0.0016


RATES = Rates()
# Float32 products are exact here, hence without tensor cores, in each way alike.
FLOAT32_SLOWER = 12.0


@dataclass(frozen=True)
class Layer:
    """The shape of one FFN."""

    width: int
    experts: int
    expert_size: int
    itemsize: int

    @property
    def expert_bytes(self) -> int:
        return 2 * self.width * self.expert_size * self.itemsize

    @property
    def pair_flops(self) -> float:
        exact = FLOAT32_SLOWER if self.itemsize > 2 else 1.0
        return 4.0 * self.width * self.expert_size * exact


def expected_union(tokens: int, k: int, experts: int) -> float:
    """Distinct experts that `tokens` independent choices of k use together."""
    return experts * (1.0 - (1.0 - k / experts) ** tokens)


def dense_us(layer: Layer, tokens: int, rates: Rates = RATES) -> float:
    """The dense FFN."""
    reading = layer.experts * layer.expert_bytes / rates.weight_bytes
    computing = tokens * layer.experts * layer.pair_flops / rates.dense_flops
    return rates.dense_launches + max(reading, computing)


def sparse_us(
    layer: Layer, tokens: int, k: int, quarters: int = 0, rates: Rates = RATES
) -> dict[str, float]:
    """Each way, routing included; `quarters` as for `sparse_way`."""
    pairs, union = tokens * k, expected_union(tokens, k, layer.experts)
    if quarters:
        union = layer.experts * quarters / 4
    few = rates.few_launches + pairs * layer.expert_bytes / rates.pair_bytes
    reading = union * layer.expert_bytes / rates.weight_bytes
    # Tiles are made for experts of 256 neurons and more.
    rate = rates.grouped_flops * min(1.0, layer.expert_size / 256)
    computing = pairs * layer.pair_flops / rate
    select = rates.select + tokens * rates.select_token
    sort = rates.sort + tokens * rates.sort_token
    costs = {"few": select + few}
    if tokens <= UNION_TOKENS and layer.itemsize == 2:
        costs["union"] = select + rates.union_launches + reading
    return costs | {
        "grouped": select + sort + rates.grouped_launches + reading + computing,
        "masked": rates.beside + tokens * rates.beside_token + dense_us(layer, tokens, rates),
    }


@functools.lru_cache(maxsize=4096)
def sparse_way(layer: Layer, tokens: int, k: int, quarters: int = 0) -> str:
    """The cheapest way for at most k experts a token.

    Args:
        layer: its shape.
        tokens: of the batch.
        k: most experts of a token.
        quarters: of the experts that such batches used of late, rounded up; 0: unknown, so take
            what independent choices would use.
    """
    costs = sparse_us(layer, tokens, k, quarters)
    return min(costs, key=lambda way: costs[way])  # the first of equals


def mixed_is_masked(layer: Layer, dense: int, sparse: int, k: int) -> bool:
    """Whether dense and sparse tokens of a batch are cheaper in one masked pass than apart."""
    apart = dense_us(layer, dense) + min(sparse_us(layer, sparse, k).values())
    return sparse_us(layer, dense + sparse, k)["masked"] <= apart
