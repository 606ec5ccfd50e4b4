"""The rule by which a token chooses its experts, in plain torch and for use inside kernels.

One rule serves every policy. Order a token's experts by score, descending, ties to the lower index.
The expert at rank r (from 0) is chosen if and only if

- its rank is below k, and
- the experts before it hold less than `mass` of the token's predicted activation mass, which is
  softmax(scores). The first expert is exempt from this: it is chosen whatever the mass.

So top-k is (k, 2.0), a mass policy is (E, p) and dense is (E, 2.0). A row with k = 0 chooses
nothing: such rows only fill a batch up. At most `max_k` experts are chosen; the caller knows that
bound as a Python integer, which sizes every output without asking the GPU.

`passes` is the rule's condition, in the one place where every kernel takes it from. A condition on
the score itself needs neither ranks nor shares: it would be one more term there, and a kernel that
has no other term could leave out `_standing`.

A score that is NaN ranks below all others, so a damaged input cannot write past the end of an
output. Every run gives the same bits: ranks come from comparing all pairs of scores, and no atomic
operation takes part in a sum.

Shapes: T tokens, E experts, N pieces of a score, K = max_k slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.gpu._triton import jit, next_power_of_2, tl
from engine.model.routing import choose_reference

# One program holds all scores of a token.
MAX_EXPERTS = 512


class Choice(NamedTuple):
    """The experts of every token.

    Attributes:
        chosen_TE: bool [T, E].
        ids_TK: int32 [T, max_k], the chosen experts of each token, ascending, padded with -1.
    """

    chosen_TE: Tensor
    ids_TK: Tensor


# --- in plain torch ------------------------------------------------------------------------------


def choose_scores_reference(scores_TE: Tensor, k_T: Tensor, mass_T: Tensor, max_k: int) -> Choice:
    """The rule's choice with its ids, from scores [T, E]; a k above max_k counts as max_k."""
    num_experts = scores_TE.shape[1]
    chosen_TE = choose_reference(scores_TE, k_T.clamp(max=max_k), mass_T)
    experts_E = torch.arange(num_experts, device=scores_TE.device)
    ids_TE = torch.where(chosen_TE, experts_E, num_experts).sort(dim=1).values
    ids_TK = ids_TE[:, :max_k].masked_fill(ids_TE[:, :max_k] == num_experts, -1)
    return Choice(chosen_TE, ids_TK.int())


# --- inside kernels ------------------------------------------------------------------------------


@jit
def passes(rank, before, k, mass):
    """Whether the rule chooses an expert: its rank, and the mass that stands before it."""
    return (rank < k) & ((rank == 0) | (before < mass))


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
    """Write the choice of token t, from the pieces of its scores times `factor`, a positive one."""
    # 1. Add up the scores, and find what turns them into shares: their maximum and their total.
    e = tl.arange(0, BLOCK_E)
    real = e < num_experts
    scores_ptr += t * num_experts
    _sum_pieces(
        pieces_ptr + t * pieces * num_experts, scores_ptr, num_experts, pieces, BLOCK_N, BLOCK_E
    )
    score = tl.load(scores_ptr + e, mask=real, other=float("-inf"))
    top = tl.max(score, axis=0)
    total = tl.sum(tl.where(real, tl.exp((score - top) * factor), 0.0), axis=0)

    # 2. Compare every expert with every other. All pairs of many experts do not fit into registers,
    # so the others come in blocks.
    rank = tl.zeros((BLOCK_E,), tl.int32)
    before = tl.zeros((BLOCK_E,), tl.float32)
    for start in range(0, num_experts, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        other = tl.load(scores_ptr + j, mask=j < num_experts, other=float("-inf"))
        share = tl.exp((other - top) * factor) / total
        ranks, shares = _standing(score, e, other, share, j, num_experts)
        rank += ranks
        before += shares

    # 3. Apply the rule.
    k = tl.minimum(tl.load(k_ptr + t), max_k)
    mass = tl.load(mass_ptr + t)
    chosen = real & passes(rank, before, k, mass)

    # 4. Write the choice twice: as a row of flags, and as ascending ids with -1 behind them.
    tl.store(chosen_ptr + t * num_experts + e, chosen, mask=real)
    slot = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(ids_ptr + t * max_k + slot, e, mask=chosen)
    unused = tl.arange(0, BLOCK_K)
    taken = tl.sum(chosen.to(tl.int32), axis=0)
    tl.store(ids_ptr + t * max_k + unused, -1, mask=(unused >= taken) & (unused < max_k))


def choose_token_blocks(num_experts: int, pieces: int, max_k: int) -> dict[str, int]:
    """Block sizes of `choose_token`, and the warps that suit it."""
    block_e = next_power_of_2(num_experts)
    return {
        "BLOCK_N": next_power_of_2(pieces),
        "BLOCK_E": block_e,
        "BLOCK_J": min(32, block_e),
        "BLOCK_K": next_power_of_2(max_k),
        "num_warps": 2 if block_e <= 32 else 4 if block_e <= 64 else 8,
    }
