"""Token-expert pairs, sorted by expert and then by token, for the products over many tokens.

Two ways lead to the same result. While serving, one program an expert counts and then writes its
pairs (`sort_pairs`): with the few hundred tokens of a prompt that is 8 us faster than the other. In
training, tokens are taken in chunks: the choice (`choose_top_k`) counts how many tokens of each
chunk chose each expert while it chooses, and one program a chunk adds those counts up to where its
pairs begin, and writes them there (`place_pairs`). Nothing waits for the device: the capacity for
pairs is T * K, and what is unused of it comes last.

Shapes: T tokens, E experts, K slots per token, C chunks of tokens, P = T * K capacity for pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.gpu._triton import jit, next_power_of_2, tl
from engine.gpu.routing.rule import Choice

# Flags that one program holds: 16 a thread with 16 warps, the most that never spill.
CHUNK_FLAGS = 8192

# Tokens that a program of one expert takes at once.
SORT_TOKENS = 512


class SortedPairs(NamedTuple):
    """A `Choice` and its token-expert pairs, sorted by expert, then by token.

    Attributes:
        chosen_TE: bool [T, E].
        ids_TK: int32 [T, max_k], the chosen experts of each token, ascending, padded with -1.
        counts_E: int32 [E], the number of tokens of each expert.
        offsets_E1: int32 [E + 1]; expert e owns the pairs offsets[e] .. offsets[e + 1].
        pair_token_P: int32 [T * max_k], the token of each pair; -1 from offsets[E] on.
        pair_slot_P: int32 [T * max_k], where `ids_TK` has each pair, counted over all of it:
            token * max_k + the pair's place among the token's experts; -1 likewise.
    """

    chosen_TE: Tensor
    ids_TK: Tensor
    counts_E: Tensor
    offsets_E1: Tensor
    pair_token_P: Tensor
    pair_slot_P: Tensor


def sort_pairs_reference(choice: Choice) -> SortedPairs:
    """What `sort_pairs` computes, by `nonzero`, which does wait for the device."""
    counts_E = choice.chosen_TE.sum(dim=0, dtype=torch.int32)
    offsets_E1 = torch.cat([counts_E.new_zeros(1), counts_E.cumsum(0, dtype=torch.int32)])
    expert_n, token_n = choice.chosen_TE.T.nonzero().unbind(1)
    place_TE = choice.chosen_TE.cumsum(1) - 1
    slot_n = token_n * choice.ids_TK.shape[1] + place_TE[token_n, expert_n]
    pair_token_P, pair_slot_P = (
        torch.full((choice.ids_TK.numel(),), -1, dtype=torch.int32, device=counts_E.device)
        for _ in range(2)
    )
    pair_token_P[: token_n.numel()] = token_n.int()
    pair_slot_P[: token_n.numel()] = slot_n.int()
    return SortedPairs(*choice, counts_E, offsets_E1, pair_token_P, pair_slot_P)


@jit
def _count_kernel(chosen_ptr, counts_ptr, num_tokens, num_experts, BLOCK_T: tl.constexpr):
    """Program e: how many tokens chose expert e."""
    e = tl.program_id(0)
    count = 0
    for start in range(0, num_tokens, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        at = chosen_ptr + t.to(tl.int64) * num_experts + e
        count += tl.sum(tl.load(at, mask=t < num_tokens, other=0).to(tl.int32), axis=0)
    tl.store(counts_ptr + e, count)


@jit
def _fill_kernel(
    chosen_ptr,
    ids_ptr,
    counts_ptr,
    offsets_ptr,
    pair_token_ptr,
    pair_slot_ptr,
    num_tokens,
    num_experts,
    max_k,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program e: the pairs of expert e, and its part of the unused tail."""
    # 1. The expert's pairs begin behind those of all experts before it.
    e = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + experts, mask=experts < num_experts, other=0)
    total = tl.sum(counts, axis=0)
    position = tl.sum(tl.where(experts < e, counts, 0), axis=0)
    tl.store(offsets_ptr + e, position)
    tl.store(offsets_ptr + num_experts, total, mask=e == 0)

    # 2. Its tokens follow in order. A pair's slot is the number of the token's experts with a lower
    # index, which only tokens that chose this expert have to look up.
    for start in range(0, num_tokens, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        at = chosen_ptr + t.to(tl.int64) * num_experts + e
        chosen = tl.load(at, mask=t < num_tokens, other=0).to(tl.int32)
        slot = t * max_k
        for first in range(0, max_k, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)[None, :]
            wanted = (chosen != 0)[:, None] & (k < max_k)
            ids = tl.load(ids_ptr + t.to(tl.int64)[:, None] * max_k + k, mask=wanted, other=-1)
            slot += tl.sum(((ids >= 0) & (ids < e)).to(tl.int32), axis=1)
        pair = position + tl.cumsum(chosen, axis=0) - 1
        tl.store(pair_token_ptr + pair, t, mask=chosen != 0)
        tl.store(pair_slot_ptr + pair, slot, mask=chosen != 0)
        position += tl.sum(chosen, axis=0)

    # 3. Positions behind the last pair belong to nobody.
    capacity = num_tokens * max_k
    tail = tl.arange(0, BLOCK_T)
    for begin in range(total + e * BLOCK_T, capacity, num_experts * BLOCK_T):
        tl.store(pair_token_ptr + begin + tail, -1, mask=begin + tail < capacity)
        tl.store(pair_slot_ptr + begin + tail, -1, mask=begin + tail < capacity)


@jit
def _place_kernel(
    chosen_ptr,
    chunk_counts_ptr,
    counts_ptr,
    offsets_ptr,
    pair_token_ptr,
    pair_slot_ptr,
    num_tokens,
    num_experts,
    num_chunks,
    max_k,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program c: the pairs of chunk c, and its part of the unused tail."""
    # 1. Count each expert's pairs in all chunks, and in those before this one.
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

    # 2. The first program writes where every expert's pairs begin.
    ends = tl.cumsum(totals, axis=0)
    if chunk == 0:
        tl.store(counts_ptr + e, totals, mask=e < num_experts)
        tl.store(offsets_ptr + 1 + e, ends, mask=e < num_experts)
        tl.store(offsets_ptr, 0)

    # 3. A pair's position is its expert's begin, plus the expert's pairs of earlier tokens. Its
    # slot is the number of the token's experts with a lower index.
    t = chunk * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    real = (t < num_tokens) & (e < num_experts)[None, :]
    at = t.to(tl.int64) * num_experts + e[None, :]
    chosen = tl.load(chosen_ptr + at, mask=real, other=0).to(tl.int32)
    pair = (ends - totals + before)[None, :] + tl.cumsum(chosen, axis=0) - 1
    tl.store(pair_token_ptr + pair, tl.zeros_like(pair) + t, mask=chosen != 0)
    slot = t * max_k + tl.cumsum(chosen, axis=1) - 1
    tl.store(pair_slot_ptr + pair, slot, mask=chosen != 0)

    # 4. Positions behind the last pair belong to nobody.
    capacity = num_tokens * max_k
    tail = tl.arange(0, BLOCK_T)
    for begin in range(tl.sum(totals, axis=0) + chunk * BLOCK_T, capacity, num_chunks * BLOCK_T):
        tl.store(pair_token_ptr + begin + tail, -1, mask=begin + tail < capacity)
        tl.store(pair_slot_ptr + begin + tail, -1, mask=begin + tail < capacity)


def sort_blocks(num_tokens: int) -> dict[str, int]:
    """Block sizes of the kernels that take one expert: as many tokens as it takes."""
    return {"BLOCK_T": min(SORT_TOKENS, next_power_of_2(num_tokens)), "num_warps": 4}


def chunk_blocks(num_experts: int) -> dict[str, int]:
    """Block sizes of the kernels that take a chunk of tokens: as many as fit."""
    block_e = next_power_of_2(num_experts)
    return {"BLOCK_T": min(256, CHUNK_FLAGS // block_e), "BLOCK_E": block_e, "num_warps": 16}


def _outputs(choice: Choice) -> tuple[Tensor, ...]:
    """Memory for counts [E], offsets [E + 1], and the tokens and slots of the pairs [P], int32."""
    num_experts, capacity = choice.chosen_TE.shape[1], choice.ids_TK.numel()
    sizes = num_experts, num_experts + 1, capacity, capacity
    device = choice.chosen_TE.device
    return tuple(torch.empty(size, dtype=torch.int32, device=device) for size in sizes)


def place_pairs(choice: Choice, chunk_counts_CE: Tensor) -> SortedPairs:
    """The sorted pairs of a choice, given how many tokens of each chunk chose each expert.

    Args:
        choice: its tensors are contiguous.
        chunk_counts_CE: int32 [C, E], for chunks of BLOCK_T tokens as `chunk_blocks` has them.
    """
    num_tokens, num_experts = choice.chosen_TE.shape
    chunks, outputs = chunk_counts_CE.shape[0], _outputs(choice)
    _place_kernel[(chunks,)](
        choice.chosen_TE,
        chunk_counts_CE,
        *outputs,
        num_tokens,
        num_experts,
        chunks,
        choice.ids_TK.shape[1],
        **chunk_blocks(num_experts),
    )
    return SortedPairs(*choice, *outputs)


def sort_pairs(choice: Choice) -> SortedPairs:
    """The pairs of a choice, whose tensors are contiguous, sorted by expert, then by token."""
    (num_tokens, num_experts), max_k = choice.chosen_TE.shape, choice.ids_TK.shape[1]
    outputs, blocks = _outputs(choice), sort_blocks(num_tokens)
    _count_kernel[(num_experts,)](choice.chosen_TE, outputs[0], num_tokens, num_experts, **blocks)
    _fill_kernel[(num_experts,)](
        choice.chosen_TE,
        choice.ids_TK,
        *outputs,
        num_tokens,
        num_experts,
        max_k,
        **blocks,
        BLOCK_E=next_power_of_2(num_experts),
        BLOCK_K=min(8, next_power_of_2(max_k)),
    )
    return SortedPairs(*choice, *outputs)
