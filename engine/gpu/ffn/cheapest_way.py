"""Which of four ways computes a sparse FFN on a GPU, decided from shapes: the GPU is not asked.

- `few_tokens` reads the weights of each token-expert pair;
- `used_experts` reads those of each expert that any token uses, and multiplies every token with
  them;
- `many_tokens` reads as much, and multiplies each token with its own experts;
- `all_experts` reads all, through dense products, and makes the choice meanwhile.

Each way is the module of that name. The last never costs much more than the dense FFN, so neither
does the cheapest of them.

Which experts a batch uses together is known to the device alone. The rule takes what independent
choices of k would give, unless the caller knows better from the steps before. Real choices share
experts, so a way that is predicted to be as fast as one that reads all is faster in truth, and wins
ties.

Shapes: T tokens, D model, E experts, S neurons per expert, k experts a token, P pairs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from engine.gpu.ffn.used_experts import MOST_TOKENS


@dataclass(frozen=True)
class Rates:
    """What each way costs; times in microseconds, as replayed from a CUDA graph.

    Fitted to benchmarks/results/h100-engine.txt (H100, bfloat16). The rule compares ways on one
    device, so only ratios matter.
    """

    weight_bytes: float = 2.9e6  # per microsecond, reading each expert once
    pair_bytes: float = 3.4e6  # reading it again for each pair, in part from the cache
    dense_flops: float = 7.0e8  # per microsecond
    many_tokens_flops: float = 5.5e8
    few_tokens_launches: float = 6.5
    used_experts_launches: float = 8.5
    many_tokens_launches: float = 9.0
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
class FFNShape:
    """The shape of one FFN, and the bytes of an element."""

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


def expected_used(tokens: int, k: int, experts: int) -> float:
    """Distinct experts that `tokens` independent choices of k use together."""
    return experts * (1.0 - (1.0 - k / experts) ** tokens)


def dense_us(shape: FFNShape, tokens: int, rates: Rates = RATES) -> float:
    """The dense FFN."""
    reading = shape.experts * shape.expert_bytes / rates.weight_bytes
    computing = tokens * shape.experts * shape.pair_flops / rates.dense_flops
    return rates.dense_launches + max(reading, computing)


def sparse_us(
    shape: FFNShape, tokens: int, k: int, quarters: int = 0, rates: Rates = RATES
) -> dict[str, float]:
    """Each way, routing included; `quarters` as for `cheapest_way`."""
    pairs, used = tokens * k, expected_used(tokens, k, shape.experts)
    if quarters:
        used = shape.experts * quarters / 4
    few = rates.few_tokens_launches + pairs * shape.expert_bytes / rates.pair_bytes
    reading = used * shape.expert_bytes / rates.weight_bytes
    # The products' tiles are made for experts of 256 neurons and more.
    rate = rates.many_tokens_flops * min(1.0, shape.expert_size / 256)
    computing = pairs * shape.pair_flops / rate
    select = rates.select + tokens * rates.select_token
    sort = rates.sort + tokens * rates.sort_token
    costs = {"few_tokens": select + few}
    if tokens <= MOST_TOKENS and shape.itemsize == 2:
        costs["used_experts"] = select + rates.used_experts_launches + reading
    return costs | {
        "many_tokens": select + sort + rates.many_tokens_launches + reading + computing,
        "all_experts": rates.beside + tokens * rates.beside_token + dense_us(shape, tokens, rates),
    }


@functools.lru_cache(maxsize=4096)
def cheapest_way(shape: FFNShape, tokens: int, k: int, quarters: int = 0) -> str:
    """The cheapest way for at most k experts a token.

    Args:
        shape: of the FFN.
        tokens: of the batch.
        k: most experts of a token.
        quarters: how many quarters of the experts such batches used of late, rounded up; 0: it is
            unknown, so take what independent choices would use.
    """
    costs = sparse_us(shape, tokens, k, quarters)
    return min(costs, key=lambda way: costs[way])  # the first of equals


def one_pass_is_cheaper(shape: FFNShape, dense: int, sparse: int, k: int) -> bool:
    """Whether dense and sparse tokens are cheaper in one pass over all experts than apart."""
    apart = dense_us(shape, dense) + min(sparse_us(shape, sparse, k).values())
    return sparse_us(shape, dense + sparse, k)["all_experts"] <= apart
