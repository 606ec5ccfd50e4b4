"""The choice where every token takes the same number of experts, as in a sparse training step.

The rule is that of `rule` with one k and no bound on mass: a token takes its k best scores, ties to
the lower index, NaN below all others. Knowing k, a program picks the experts of many tokens at
once, best after best, and every token fills its slots, so that training's tens of thousands of
tokens cost microseconds. Two launches, of which `pairs` has the second. Nothing waits for the
device, no atomic operation takes part, and every run gives the same bits.

Shapes: T tokens, E experts, K chosen, C chunks of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.gpu._triton import cdiv, jit, tl
from engine.gpu.routing.pairs import SortedPairs, chunk_blocks, place_pairs, sort_pairs_reference
from engine.gpu.routing.rule import MAX_EXPERTS, Choice, choose_scores_reference


def choose_top_k_reference(scores_TE: Tensor, k: int) -> SortedPairs:
    """What `choose_top_k` computes, by sorting; a row with no finite score takes one expert."""
    k_T = torch.full_like(scores_TE[:, 0], k, dtype=torch.int32)
    mass_T = torch.full_like(scores_TE[:, 0], 2.0, dtype=torch.float32)
    return sort_pairs_reference(choose_scores_reference(scores_TE, k_T, mass_T, k))


@jit
def _pick_kernel(
    scores_ptr,
    chosen_ptr,
    ids_ptr,
    chunk_counts_ptr,
    num_tokens,
    num_experts,
    max_k,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program c: the choice of the tokens of chunk c, and how many of them chose each expert."""
    # 1. Read all scores of the chunk; what is damaged or absent ranks last.
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)[None, :]
    real = (t < num_tokens)[:, None] & (e < num_experts)
    at = t[:, None] * num_experts + e
    score = tl.load(scores_ptr + at, mask=real, other=float("-inf")).to(tl.float32)
    score = tl.where(score == score, score, float("-inf"))

    # 2. Take the best that is left of every token, max_k times.
    left = real
    for _ in range(max_k):
        best = tl.max(tl.where(left, score, float("-inf")), axis=1)[:, None]
        first = tl.min(tl.where(left & (score == best), e, BLOCK_E), axis=1)[:, None]
        left = left & (e != first)
    chosen = real & (left == 0)

    # 3. Write the choice as flags and as ascending ids, and the chunk's share of every expert.
    tl.store(chosen_ptr + at, chosen, mask=real)
    slot = tl.cumsum(chosen.to(tl.int32), axis=1) - 1
    tl.store(ids_ptr + t[:, None] * max_k + slot, tl.zeros_like(slot) + e, mask=chosen)
    count = tl.sum(chosen.to(tl.int32), axis=0)[None, :]
    tl.store(chunk_counts_ptr + tl.program_id(0) * num_experts + e, count, mask=e < num_experts)


def choose_top_k(scores_TE: Tensor, k: int) -> SortedPairs:
    """The k best experts of every token, and their pairs sorted by expert, then by token.

    Args:
        scores_TE: [T, E], any float type; T >= 1, E <= MAX_EXPERTS.
        k: 1 .. E.
    """
    num_tokens, num_experts = scores_TE.shape
    assert num_tokens >= 1
    assert 1 <= k <= num_experts <= MAX_EXPERTS
    blocks = chunk_blocks(num_experts)
    chunks, device = cdiv(num_tokens, blocks["BLOCK_T"]), scores_TE.device
    chosen_TE = torch.empty_like(scores_TE, dtype=torch.bool, memory_format=torch.contiguous_format)
    ids_TK = torch.empty((num_tokens, k), dtype=torch.int32, device=device)
    chunk_counts_CE = torch.empty((chunks, num_experts), dtype=torch.int32, device=device)
    _pick_kernel[(chunks,)](
        scores_TE.contiguous(),
        chosen_TE,
        ids_TK,
        chunk_counts_CE,
        num_tokens,
        num_experts,
        k,
        **blocks,
    )
    return place_pairs(Choice(chosen_TE, ids_TK), chunk_counts_CE)
