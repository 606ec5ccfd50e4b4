# Triton types a kernel's arguments by itself, at each launch.
# mypy: disable-error-code="no-untyped-def"
"""Routing where every token takes the same number of experts, as in a sparse training step.

The rule is `routing`'s with one k and no bound on mass: a token takes its k best scores, ties to
the lower index, NaN below all others. Knowing k, a program picks the experts of many tokens at
once, best after best, and every token fills its slots, so that training's tens of thousands of
tokens cost microseconds. Two launches; nothing waits for the device, no atomic operation takes
part, and every run gives the same bits.

Shapes: T tokens, E experts, K chosen, C chunks of tokens, P = T * K pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.gpu._triton import cdiv, jit, next_power_of_2, tl
from engine.gpu.routing.routing import MAX_EXPERTS, Routing, route_scores_reference

# Scores that one program holds: 16 a thread with 16 warps, the most that never spill.
TILE_SCORES = 8192


def route_top_k_reference(scores_TE: Tensor, k: int) -> Routing:
    """As `route_top_k`, by sorting; a row without any finite score takes one expert alone."""
    k_T = torch.full_like(scores_TE[:, 0], k, dtype=torch.int32)
    mass_T = torch.full_like(scores_TE[:, 0], 2.0, dtype=torch.float32)
    return route_scores_reference(scores_TE, k_T, mass_T, k)


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
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)[None, :]
    real = (t < num_tokens)[:, None] & (e < num_experts)
    at = t[:, None] * num_experts + e
    score = tl.load(scores_ptr + at, mask=real, other=float("-inf")).to(tl.float32)
    score = tl.where(score == score, score, float("-inf"))
    left = real
    for _ in range(max_k):
        best = tl.max(tl.where(left, score, float("-inf")), axis=1)[:, None]
        first = tl.min(tl.where(left & (score == best), e, BLOCK_E), axis=1)[:, None]
        left = left & (e != first)
    chosen = real & (left == 0)
    tl.store(chosen_ptr + at, chosen, mask=real)
    slot = tl.cumsum(chosen.to(tl.int32), axis=1) - 1
    tl.store(ids_ptr + t[:, None] * max_k + slot, tl.zeros_like(slot) + e, mask=chosen)
    count = tl.sum(chosen.to(tl.int32), axis=0)[None, :]
    tl.store(chunk_counts_ptr + tl.program_id(0) * num_experts + e, count, mask=e < num_experts)


@jit
def _place_kernel(
    chosen_ptr,
    chunk_counts_ptr,
    counts_ptr,
    offsets_ptr,
    pair_token_ptr,
    num_tokens,
    num_experts,
    num_chunks,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program c: the pairs of chunk c; the first also writes what concerns all chunks."""
    chunk = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    totals = tl.zeros((BLOCK_E,), tl.int32)
    before = tl.zeros((BLOCK_E,), tl.int32)
    for begin in range(0, num_chunks, BLOCK_T):
        c = begin + tl.arange(0, BLOCK_T)[:, None]
        inside = (c < num_chunks) & (e < num_experts)[None, :]
        counts = tl.load(chunk_counts_ptr + c * num_experts + e[None, :], mask=inside, other=0)
        totals += tl.sum(counts, axis=0)
        before += tl.sum(tl.where(c < chunk, counts, 0), axis=0)
    ends = tl.cumsum(totals, axis=0)
    if chunk == 0:
        tl.store(counts_ptr + e, totals, mask=e < num_experts)
        tl.store(offsets_ptr + 1 + e, ends, mask=e < num_experts)
        tl.store(offsets_ptr, 0)
    t = chunk * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    real = (t < num_tokens) & (e < num_experts)[None, :]
    at = t.to(tl.int64) * num_experts + e[None, :]
    chosen = tl.load(chosen_ptr + at, mask=real, other=0).to(tl.int32)
    pair = (ends - totals + before)[None, :] + tl.cumsum(chosen, axis=0) - 1
    tl.store(pair_token_ptr + pair, tl.zeros_like(pair) + t, mask=chosen != 0)


def top_k_blocks(num_experts: int) -> dict[str, int]:
    """Block sizes of both kernels: as many tokens as fit."""
    block_e = next_power_of_2(num_experts)
    return {"BLOCK_T": min(256, TILE_SCORES // block_e), "BLOCK_E": block_e, "num_warps": 16}


def route_top_k(scores_TE: Tensor, k: int) -> Routing:
    """The k best experts of every token, and their pairs sorted by expert, then by token.

    Args:
        scores_TE: [T, E], any float type; T >= 1, E <= MAX_EXPERTS.
        k: 1 .. E.
    """
    num_tokens, num_experts = scores_TE.shape
    assert num_tokens >= 1
    assert 1 <= k <= num_experts <= MAX_EXPERTS
    blocks = top_k_blocks(num_experts)
    chunks = cdiv(num_tokens, blocks["BLOCK_T"])
    chosen_TE = torch.empty_like(scores_TE, dtype=torch.bool, memory_format=torch.contiguous_format)
    ids_TK, chunk_counts_CE, counts_E, offsets_E1, pair_token_P = (
        torch.empty(shape, dtype=torch.int32, device=scores_TE.device)
        for shape in (
            (num_tokens, k),
            (chunks, num_experts),
            (num_experts,),
            (num_experts + 1,),
            (num_tokens * k,),
        )
    )
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
    _place_kernel[(chunks,)](
        chosen_TE,
        chunk_counts_CE,
        counts_E,
        offsets_E1,
        pair_token_P,
        num_tokens,
        num_experts,
        chunks,
        **blocks,
    )
    return Routing(chosen_TE, ids_TK, counts_E, offsets_E1, pair_token_P)
