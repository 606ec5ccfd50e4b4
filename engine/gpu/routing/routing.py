# Triton types a kernel's arguments by itself, at each launch.
# mypy: disable-error-code="no-untyped-def"
"""Routing: from scores to chosen experts, and from chosen experts to pairs sorted by expert.

One rule serves every policy. Order a token's experts by score, descending, ties to the lower index.
The expert at rank r (from 0) is chosen iff r < k and the predicted shares of activation mass of the
experts before it, softmax(scores), sum to less than `mass`. Rank 0 is always chosen, unless k is
0: that is for rows which only fill a batch up and choose nothing. So top-k is (k, 2.0), a mass
policy is (E, p) and dense is (E, 2.0). At most `max_k` experts are chosen: the caller knows that
bound as a Python integer, and it sizes every output without asking the GPU.

Nothing here waits for the device, and every run gives the same bits: ranks come from comparing all
pairs of scores, positions from prefix sums, and no atomic operation takes part. A score that is NaN
ranks below all others, so a damaged input cannot write past the end of an output.

A token's choice does not depend on the rest of the batch, not even in the last bit of a score.

Launches: two for `select` (scores, choice), two more to sort the pairs.

Shapes: T tokens, D model, E experts, N pieces of a score, K = max_k slots, P = T * K capacity for
token-expert pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.gpu._triton import cdiv, jit, next_power_of_2, tl

# A token's scores are sums of pieces over this many elements of D, computed side by side: with few
# tokens, what takes time is the length of one program's loop.
PIECE_D = 256

# One program holds all scores of a token.
MAX_EXPERTS = 512

# Tokens that one step of the pair sort takes.
SORT_TOKENS = 1024


class Choice(NamedTuple):
    """The experts of every token.

    Attributes:
        chosen_TE: bool [T, E].
        ids_TK: int32 [T, max_k], the chosen experts of each token, ascending, padded with -1.
    """

    chosen_TE: Tensor
    ids_TK: Tensor


class Routing(NamedTuple):
    """A `Choice` and its token-expert pairs, sorted by expert, then by token.

    Attributes:
        chosen_TE: bool [T, E].
        ids_TK: int32 [T, max_k], the chosen experts of each token, ascending, padded with -1.
        counts_E: int32 [E], the number of tokens of each expert.
        offsets_E1: int32 [E + 1]; expert e owns the pairs offsets[e] .. offsets[e + 1].
        pair_token_P: int32 [T * max_k], the token of each pair; -1 from offsets[E] on.
    """

    chosen_TE: Tensor
    ids_TK: Tensor
    counts_E: Tensor
    offsets_E1: Tensor
    pair_token_P: Tensor


# --- references ----------------------------------------------------------------------------------


def choose_reference(scores_TE: Tensor, k_T: Tensor, mass_T: Tensor) -> Tensor:
    """The rule itself: scores [T, E], k int32 [T], mass float32 [T] -> chosen, bool [T, E]."""
    scores_TE = scores_TE.float()
    scores_TE = scores_TE.masked_fill(scores_TE.isnan(), -torch.inf)
    order_TE = scores_TE.sort(dim=1, descending=True, stable=True).indices
    shares_TE = scores_TE.softmax(dim=1).gather(1, order_TE)
    before_TE = shares_TE.cumsum(dim=1).roll(1, dims=1)
    rank_E = torch.arange(scores_TE.shape[1], device=scores_TE.device)
    in_order_TE = (rank_E < k_T[:, None]) & (before_TE < mass_T[:, None])
    in_order_TE[:, 0] = k_T > 0
    return torch.zeros_like(in_order_TE).scatter(1, order_TE, in_order_TE)


def select_scores_reference(scores_TE: Tensor, k_T: Tensor, mass_T: Tensor, max_k: int) -> Choice:
    """As `select_scores`, by sorting."""
    num_experts = scores_TE.shape[1]
    chosen_TE = choose_reference(scores_TE, k_T.clamp(max=max_k), mass_T)
    experts_E = torch.arange(num_experts, device=scores_TE.device)
    ids_TE = torch.where(chosen_TE, experts_E, num_experts).sort(dim=1).values
    ids_TK = ids_TE[:, :max_k].masked_fill(ids_TE[:, :max_k] == num_experts, -1)
    return Choice(chosen_TE, ids_TK.int())


def select_reference(
    x_TD: Tensor, router_ED: Tensor, k_T: Tensor, mass_T: Tensor, max_k: int
) -> Choice:
    """As `select`, by sorting."""
    return select_scores_reference(x_TD.float() @ router_ED.float().T, k_T, mass_T, max_k)


def sort_pairs_reference(choice: Choice) -> Routing:
    """As `sort_pairs`, by `nonzero`, which does wait for the device."""
    counts_E = choice.chosen_TE.sum(dim=0, dtype=torch.int32)
    offsets_E1 = torch.cat([counts_E.new_zeros(1), counts_E.cumsum(0, dtype=torch.int32)])
    token_n = choice.chosen_TE.T.nonzero()[:, 1].int()
    pair_token_P = token_n.new_full((choice.ids_TK.numel(),), -1)
    pair_token_P[: token_n.numel()] = token_n
    return Routing(*choice, counts_E, offsets_E1, pair_token_P)


def route_reference(
    x_TD: Tensor, router_ED: Tensor, k_T: Tensor, mass_T: Tensor, max_k: int
) -> Routing:
    """As `route`, by sorting."""
    return sort_pairs_reference(select_reference(x_TD, router_ED, k_T, mass_T, max_k))


def route_scores_reference(scores_TE: Tensor, k_T: Tensor, mass_T: Tensor, max_k: int) -> Routing:
    """As `route_scores`, by sorting."""
    return sort_pairs_reference(select_scores_reference(scores_TE, k_T, mass_T, max_k))


# --- kernels -------------------------------------------------------------------------------------


@jit
def _scores_kernel(
    x_ptr,
    router_ptr,
    pieces_ptr,
    num_tokens,
    num_experts,
    d_model,
    PIECE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (i, j, n): piece n of the scores of BLOCK_T tokens for BLOCK_E experts."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    piece = tl.program_id(2)
    x_rows = x_ptr + t.to(tl.int64)[:, None] * d_model
    router_rows = router_ptr + e[:, None] * d_model
    scores = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for start in range(0, PIECE, BLOCK_D):
        d = piece * PIECE + start + tl.arange(0, BLOCK_D)
        in_d = (d < d_model)[None, :]
        x = tl.load(x_rows + d[None, :], mask=(t < num_tokens)[:, None] & in_d, other=0.0)
        router = tl.load(
            router_rows + d[None, :], mask=(e < num_experts)[:, None] & in_d, other=0.0
        )
        # Three TF32 products carry float32's precision on the tensor cores.
        scores = tl.dot(
            x.to(tl.float32), tl.trans(router.to(tl.float32)), scores, input_precision="tf32x3"
        )
    row = t.to(tl.int64) * tl.num_programs(2) + piece
    tl.store(
        pieces_ptr + row[:, None] * num_experts + e[None, :],
        scores,
        mask=(t < num_tokens)[:, None] & (e < num_experts)[None, :],
    )


@jit
def _sum_pieces(
    pieces_ptr, scores_ptr, num_experts, pieces, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Write each expert's score, the sum of its pieces; -inf for NaN.

    Every comparison reads what is written here: a sum that is taken twice, by other threads in
    another order, could differ in its last bit, and an expert would stand before itself.
    """
    e = tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    mask = (n < pieces)[:, None] & (e < num_experts)[None, :]
    at = pieces_ptr + n[:, None] * num_experts + e[None, :]
    score = tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float32), axis=0)
    tl.store(scores_ptr + e, tl.where(score == score, score, float("-inf")), mask=e < num_experts)
    tl.debug_barrier()


@jit
def _standing(score, e, other, other_share, other_e, num_experts):
    """How many of the other experts, and what share of mass, come before each expert."""
    tie = (other[None, :] == score[:, None]) & (other_e[None, :] < e[:, None])
    ahead = ((other[None, :] > score[:, None]) | tie) & (other_e < num_experts)[None, :]
    rank = tl.sum(ahead.to(tl.int32), axis=1)
    return rank, tl.sum(tl.where(ahead, other_share[None, :], 0.0), axis=1)


@jit
def choose_token(
    t,
    pieces_ptr,
    scores_ptr,
    factor,
    k_ptr,
    mass_ptr,
    chosen_ptr,
    ids_ptr,
    num_experts,
    pieces,
    max_k,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The choice of token t, from the pieces of its scores times `factor`, which is positive."""
    e = tl.arange(0, BLOCK_E)
    real = e < num_experts
    scores_ptr += t * num_experts
    _sum_pieces(
        pieces_ptr + t * pieces * num_experts, scores_ptr, num_experts, pieces, BLOCK_N, BLOCK_E
    )
    score = tl.load(scores_ptr + e, mask=real, other=float("-inf"))
    top = tl.max(score, axis=0)
    total = tl.sum(tl.where(real, tl.exp((score - top) * factor), 0.0), axis=0)

    # All pairs of many experts do not fit into registers, so one side comes in blocks.
    rank = tl.zeros((BLOCK_E,), tl.int32)
    before = tl.zeros((BLOCK_E,), tl.float32)
    for start in range(0, num_experts, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        other = tl.load(scores_ptr + j, mask=j < num_experts, other=float("-inf"))
        share = tl.exp((other - top) * factor) / total
        ranks, shares = _standing(score, e, other, share, j, num_experts)
        rank += ranks
        before += shares
    k = tl.minimum(tl.load(k_ptr + t), max_k)
    mass = tl.load(mass_ptr + t)
    chosen = real & (rank < k) & ((rank == 0) | (before < mass))

    tl.store(chosen_ptr + t * num_experts + e, chosen, mask=real)
    slot = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(ids_ptr + t * max_k + slot, e, mask=chosen)
    unused = tl.arange(0, BLOCK_K)
    taken = tl.sum(chosen.to(tl.int32), axis=0)
    tl.store(ids_ptr + t * max_k + unused, -1, mask=(unused >= taken) & (unused < max_k))


@jit
def _choose_kernel(
    pieces_ptr,
    scores_ptr,
    k_ptr,
    mass_ptr,
    chosen_ptr,
    ids_ptr,
    num_experts,
    pieces,
    max_k,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program t: the choice of token t."""
    choose_token(
        tl.program_id(0).to(tl.int64),
        pieces_ptr,
        scores_ptr,
        1.0,
        k_ptr,
        mass_ptr,
        chosen_ptr,
        ids_ptr,
        num_experts,
        pieces,
        max_k,
        BLOCK_N,
        BLOCK_E,
        BLOCK_J,
        BLOCK_K,
    )


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
    counts_ptr,
    offsets_ptr,
    pair_token_ptr,
    num_tokens,
    num_experts,
    capacity,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program e: offset and pairs of expert e, and its part of the unused tail."""
    e = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + experts, mask=experts < num_experts, other=0)
    total = tl.sum(counts, axis=0)
    position = tl.sum(tl.where(experts < e, counts, 0), axis=0)
    tl.store(offsets_ptr + e, position)
    tl.store(offsets_ptr + num_experts, total, mask=e == 0)
    for start in range(0, num_tokens, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        at = chosen_ptr + t.to(tl.int64) * num_experts + e
        chosen = tl.load(at, mask=t < num_tokens, other=0).to(tl.int32)
        nth = tl.cumsum(chosen, axis=0) - 1
        tl.store(pair_token_ptr + position + nth, t, mask=chosen != 0)
        position += tl.sum(chosen, axis=0)
    for start in range(total + e * BLOCK_T, capacity, num_experts * BLOCK_T):
        p = start + tl.arange(0, BLOCK_T)
        tl.store(pair_token_ptr + p, -1, mask=p < capacity)


# --- launchers -----------------------------------------------------------------------------------


def scores_blocks(num_experts: int, itemsize: int) -> dict[str, int]:
    """Block sizes of `_scores_kernel` for tokens of this many bytes an element."""
    block_e = min(64, max(16, next_power_of_2(num_experts)))
    return {
        "PIECE": PIECE_D,
        "BLOCK_T": 16,
        "BLOCK_E": block_e,
        "BLOCK_D": 128,
        "num_warps": itemsize,
        "num_stages": 3,
    }


def choose_blocks(num_experts: int, pieces: int, max_k: int) -> dict[str, int]:
    """Block sizes of `_choose_kernel`."""
    block_e = next_power_of_2(num_experts)
    return {
        "BLOCK_N": next_power_of_2(pieces),
        "BLOCK_E": block_e,
        "BLOCK_J": min(32, block_e),
        "BLOCK_K": next_power_of_2(max_k),
        "num_warps": 2 if block_e <= 32 else 4 if block_e <= 64 else 8,
    }


def sort_blocks(num_tokens: int) -> dict[str, int]:
    """Block sizes of `_count_kernel`, which `_fill_kernel` shares."""
    return {"BLOCK_T": min(SORT_TOKENS, next_power_of_2(num_tokens)), "num_warps": 4}


def score_pieces(x_TD: Tensor, router_ED: Tensor, blocks: dict[str, int] | None = None) -> Tensor:
    """x @ router.T in pieces along D: float32 [T, pieces, E]."""
    (num_tokens, d_model), num_experts = x_TD.shape, router_ED.shape[0]
    pieces = cdiv(d_model, PIECE_D)
    shape = (num_tokens, pieces, num_experts)
    pieces_TNE = torch.empty(shape, dtype=torch.float32, device=x_TD.device)
    blocks = blocks or scores_blocks(num_experts, x_TD.element_size())
    grid = (cdiv(num_tokens, blocks["BLOCK_T"]), cdiv(num_experts, blocks["BLOCK_E"]), pieces)
    _scores_kernel[grid](
        x_TD.contiguous(),
        router_ED.contiguous(),
        pieces_TNE,
        num_tokens,
        num_experts,
        d_model,
        **blocks,
    )
    return pieces_TNE


def choose(pieces_TNE: Tensor, k_T: Tensor, mass_T: Tensor, max_k: int) -> tuple[Choice, Tensor]:
    """`select_scores` from scores that are the sums of pieces; and the scores, float32 [T, E]."""
    num_tokens, pieces, num_experts = pieces_TNE.shape
    assert num_tokens >= 1
    assert 1 <= max_k <= num_experts <= MAX_EXPERTS
    assert k_T.shape == mass_T.shape == (num_tokens,)
    assert k_T.dtype == torch.int32
    assert mass_T.dtype == torch.float32
    device = pieces_TNE.device
    chosen_TE = torch.empty((num_tokens, num_experts), dtype=torch.bool, device=device)
    ids_TK = torch.empty((num_tokens, max_k), dtype=torch.int32, device=device)
    scores_TE = torch.empty((num_tokens, num_experts), dtype=torch.float32, device=device)
    _choose_kernel[(num_tokens,)](
        pieces_TNE.contiguous(),
        scores_TE,
        k_T.contiguous(),
        mass_T.contiguous(),
        chosen_TE,
        ids_TK,
        num_experts,
        pieces,
        max_k,
        **choose_blocks(num_experts, pieces, max_k),
    )
    return Choice(chosen_TE, ids_TK), scores_TE


def select_scores(scores_TE: Tensor, k_T: Tensor, mass_T: Tensor, max_k: int) -> Choice:
    """The choice from given scores, as evaluation's oracle needs (its scores are true mass).

    Args:
        scores_TE: [T, E], any float type; T >= 1, E <= MAX_EXPERTS.
        k_T: int32 [T], the most experts of each token; values above max_k count as max_k.
        mass_T: float32 [T], the share of predicted mass at which a token has enough.
        max_k: the width of `ids_TK`, 1 .. E.
    """
    return choose(scores_TE[:, None], k_T, mass_T, max_k)[0]


def select(x_TD: Tensor, router_ED: Tensor, k_T: Tensor, mass_T: Tensor, max_k: int) -> Choice:
    """The choice of every token, with scores x @ router.T in float32.

    Args:
        x_TD: [T, D], any float type; T >= 1.
        router_ED: [E, D], any float type; E <= MAX_EXPERTS.
        k_T, mass_T, max_k: as for `select_scores`.
    """
    assert x_TD.shape[1] == router_ED.shape[1]
    return choose(score_pieces(x_TD, router_ED), k_T, mass_T, max_k)[0]


def sort_pairs(choice: Choice) -> Routing:
    """Sort the pairs of a choice by expert, then by token."""
    num_tokens, num_experts = choice.chosen_TE.shape
    capacity = choice.ids_TK.numel()
    counts_E, offsets_E1, pair_token_P = (
        torch.empty(size, dtype=torch.int32, device=choice.chosen_TE.device)
        for size in (num_experts, num_experts + 1, capacity)
    )
    blocks = sort_blocks(num_tokens)
    _count_kernel[(num_experts,)](choice.chosen_TE, counts_E, num_tokens, num_experts, **blocks)
    _fill_kernel[(num_experts,)](
        choice.chosen_TE,
        counts_E,
        offsets_E1,
        pair_token_P,
        num_tokens,
        num_experts,
        capacity,
        BLOCK_E=next_power_of_2(num_experts),
        **blocks,
    )
    return Routing(*choice, counts_E, offsets_E1, pair_token_P)


def route(x_TD: Tensor, router_ED: Tensor, k_T: Tensor, mass_T: Tensor, max_k: int) -> Routing:
    """`select`, then `sort_pairs`: for the grouped FFN; the few-token FFN needs only the first."""
    return sort_pairs(select(x_TD, router_ED, k_T, mass_T, max_k))


def route_scores(scores_TE: Tensor, k_T: Tensor, mass_T: Tensor, max_k: int) -> Routing:
    """`select_scores`, then `sort_pairs`."""
    return sort_pairs(select_scores(scores_TE, k_T, mass_T, max_k))
