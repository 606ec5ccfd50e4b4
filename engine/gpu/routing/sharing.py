# Triton types a kernel's arguments by itself, at each launch.
# mypy: disable-error-code="no-untyped-def"
"""Shared choice: what a batch reads anyway takes the place of what only one token asks for.

The rule, for a token that shares at k. Its *own* experts are its top k by score.

1. The better half of its own, `kept(k)`, it takes whatever the company. What all tokens of the
   batch take so far, those that do not share included, is *read*.
2. Its *riders* are the best `room(k)` read experts that are not its own. Of its own that are not
   read it gives up the worst, as many as have together no more predicted activation mass,
   exp(score), than the riders. The rest it takes: they are read too now.
3. It uses the best k + `room(k)` of all that is read.

So a batch reads no expert that it would not read if all used their own top k, and each token holds
as much predicted mass as its own top k at least (but for rounding). A token alone has no riders,
gives nothing up and uses its own top k. Tokens that do not share keep their choice. docs/engine.md
says what this saves and what it costs.

Two more passes over the choice, each of two launches; none waits for the device. All ties go to the
lower index, NaN ranks last, and a token without any score that is a number shares nothing.

Shapes: T tokens, D model, E experts, K = max_k slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.gpu._triton import jit, next_power_of_2, tl
from engine.gpu.routing import routing
from engine.gpu.routing.routing import Choice


def kept(k: int) -> int:
    """How many of its own k experts a token takes whatever the company."""
    return (k + 1) // 2


def room(k: int) -> int:
    """How many experts a token may use beyond k."""
    return k // 2


def most(k: int, num_experts: int) -> int:
    """How many experts a token uses at most."""
    return min(k + room(k), num_experts)


# --- reference -----------------------------------------------------------------------------------


def share_reference(scores_TE: Tensor, chosen_TE: Tensor, k_T: Tensor) -> Tensor:
    """As `share`, by sorting; any number of batches may stand in front: [..., T, E], [..., T]."""
    scores_TE = scores_TE.float()
    scores_TE = scores_TE.masked_fill(scores_TE.isnan(), -torch.inf)
    top_T1 = scores_TE.amax(-1, keepdim=True)
    k_T1 = k_T[..., None].masked_fill(top_T1 == -torch.inf, 0)
    order_TE = scores_TE.sort(dim=-1, descending=True, stable=True).indices
    mass_TE = (scores_TE - top_T1).exp().gather(-1, order_TE)
    own_TE = torch.arange(scores_TE.shape[-1], device=scores_TE.device) < k_T1

    def ordered(read_1E: Tensor) -> Tensor:
        return read_1E.expand_as(chosen_TE).gather(-1, order_TE)

    def in_place(ordered_TE: Tensor) -> Tensor:
        return torch.zeros_like(chosen_TE).scatter(-1, order_TE, ordered_TE)

    room_T1 = k_T1 // 2
    read_1E = chosen_TE.any(-2, keepdim=True)
    read_TE = ordered(read_1E)
    others_TE = read_TE & ~own_TE
    riders_T1 = (mass_TE * (others_TE & (others_TE.cumsum(-1) <= room_T1))).sum(-1, keepdim=True)
    missing_TE = own_TE & ~read_TE
    missed_TE = mass_TE * missing_TE
    from_here_TE = missed_TE.sum(-1, keepdim=True) - (missed_TE.cumsum(-1) - missed_TE)
    taken_TE = missing_TE & ((from_here_TE > riders_T1) | (riders_T1 == 0))
    read_TE = ordered(read_1E | in_place(taken_TE).any(-2, keepdim=True))
    used_TE = read_TE & (read_TE.cumsum(-1) <= k_T1 + room_T1)
    return torch.where(k_T1 > 0, in_place(used_TE), chosen_TE)


# --- kernels -------------------------------------------------------------------------------------


@jit
def _load_scores(scores_ptr, e, num_experts):
    """Scores of experts e; -inf past the last expert and for NaN."""
    score = tl.load(scores_ptr + e, mask=e < num_experts, other=float("-inf")).to(tl.float32)
    return tl.where(score == score, score, float("-inf"))


@jit
def _standing(
    scores_ptr,
    read_ptr,
    score,
    e,
    top,
    num_experts,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """How many experts stand before each expert, how many read ones, and the others' mass."""
    rank = tl.zeros((BLOCK_E,), tl.int32)
    read_rank = tl.zeros((BLOCK_E,), tl.int32)
    missed = tl.zeros((BLOCK_E,), tl.float32)
    for start in range(0, num_experts, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        other = _load_scores(scores_ptr, j, num_experts)
        other_read = tl.load(read_ptr + j, mask=j < num_experts, other=0) != 0
        mass = tl.where(other_read, 0.0, tl.exp(other - top))
        tie = (other[None, :] == score[:, None]) & (j[None, :] < e[:, None])
        ahead = ((other[None, :] > score[:, None]) | tie) & (j < num_experts)[None, :]
        rank += tl.sum(ahead.to(tl.int32), axis=1)
        read_rank += tl.sum((ahead & other_read[None, :]).to(tl.int32), axis=1)
        missed += tl.sum(tl.where(ahead, mass[None, :], 0.0), axis=1)
    return rank, read_rank, missed


@jit
def _take_kernel(
    scores_ptr,
    read_ptr,
    k_ptr,
    chosen_ptr,
    taken_ptr,
    num_experts,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Program t: step 2 of token t; `taken` is its choice with those of its own that it needs."""
    t = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    real = e < num_experts
    scores_ptr += t * num_experts
    score = _load_scores(scores_ptr, e, num_experts)
    top = tl.max(score, axis=0)
    k = tl.where(top > float("-inf"), tl.load(k_ptr + t), 0)
    read = tl.load(read_ptr + e, mask=real, other=0) != 0
    rank, read_rank, missed = _standing(
        scores_ptr, read_ptr, score, e, top, num_experts, BLOCK_E, BLOCK_J
    )
    mass = tl.exp(score - top)
    own_read = tl.sum((real & read & (rank < k)).to(tl.int32), axis=0)
    rides = real & read & (rank >= k) & (read_rank - own_read < k // 2)
    riders = tl.sum(tl.where(rides, mass, 0.0), axis=0)
    missing = real & (read == 0) & (rank < k)
    from_here = tl.sum(tl.where(missing, mass, 0.0), axis=0) - missed
    # Without riders nothing is given up, however the sums are rounded.
    taken = missing & (from_here > tl.where(riders > 0.0, riders, -1.0))
    at = t * num_experts + e
    chosen = tl.load(chosen_ptr + at, mask=real, other=0) != 0
    tl.store(taken_ptr + at, chosen | taken, mask=real)


@jit
def _use_kernel(
    scores_ptr,
    read_ptr,
    k_ptr,
    chosen_ptr,
    used_ptr,
    ids_ptr,
    num_experts,
    max_k,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program t: step 3 of token t, and its ids; one that does not share keeps its choice."""
    t = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    real = e < num_experts
    scores_ptr += t * num_experts
    score = _load_scores(scores_ptr, e, num_experts)
    top = tl.max(score, axis=0)
    k = tl.where(top > float("-inf"), tl.load(k_ptr + t), 0)
    read = tl.load(read_ptr + e, mask=real, other=0) != 0
    _, read_rank, _ = _standing(scores_ptr, read_ptr, score, e, top, num_experts, BLOCK_E, BLOCK_J)
    at = t * num_experts + e
    chosen = tl.load(chosen_ptr + at, mask=real, other=0) != 0
    used = tl.where(k > 0, read & (read_rank < k + k // 2), chosen) & real
    tl.store(used_ptr + at, used, mask=real)
    slot = tl.cumsum(used.to(tl.int32), axis=0) - 1
    tl.store(ids_ptr + t * max_k + slot, e, mask=used)
    unused = tl.arange(0, BLOCK_K)
    count = tl.sum(used.to(tl.int32), axis=0)
    tl.store(ids_ptr + t * max_k + unused, -1, mask=(unused >= count) & (unused < max_k))


# --- launchers -----------------------------------------------------------------------------------


def take_blocks(num_experts: int) -> dict[str, int]:
    """Block sizes of `_take_kernel`."""
    block_e = next_power_of_2(num_experts)
    return {
        "BLOCK_E": block_e,
        "BLOCK_J": min(32 if block_e <= 256 else 16, block_e),
        "num_warps": 2 if block_e <= 32 else 4 if block_e <= 64 else 8,
    }


def use_blocks(num_experts: int, max_k: int) -> dict[str, int]:
    """Block sizes of `_use_kernel`."""
    return {**take_blocks(num_experts), "BLOCK_K": next_power_of_2(max_k)}


def share(scores_TE: Tensor, choice: Choice, k_T: Tensor) -> Choice:
    """The choice of a batch after sharing.

    Args:
        scores_TE: [T, E], any float type; T >= 1, E <= MAX_EXPERTS.
        choice: of tokens that share, `kept(k)` of their own; of others what they use. Its width,
            max_k, is at least `most` of those that share.
        k_T: int32 [T]; 0 for tokens that do not share.
    """
    (num_tokens, num_experts), max_k = scores_TE.shape, choice.ids_TK.shape[1]
    assert k_T.shape == (num_tokens,)
    assert k_T.dtype == torch.int32
    scores_TE, k_T = scores_TE.contiguous(), k_T.contiguous()
    taken_TE, used_TE = (torch.empty_like(choice.chosen_TE) for _ in range(2))
    ids_TK = torch.empty_like(choice.ids_TK)
    _take_kernel[(num_tokens,)](
        scores_TE,
        choice.chosen_TE.any(0),
        k_T,
        choice.chosen_TE,
        taken_TE,
        num_experts,
        **take_blocks(num_experts),
    )
    _use_kernel[(num_tokens,)](
        scores_TE,
        taken_TE.any(0),
        k_T,
        choice.chosen_TE,
        used_TE,
        ids_TK,
        num_experts,
        max_k,
        **use_blocks(num_experts, max_k),
    )
    return Choice(used_TE, ids_TK)


def select(
    x_TD: Tensor,
    router_ED: Tensor,
    k_T: Tensor,
    mass_T: Tensor,
    shared_T: Tensor,
    max_k: int,
) -> Choice:
    """`routing.select` of a batch in which tokens share; arguments as there, and

    Args:
        k_T: of a token that shares, `kept` of its k.
        shared_T: int32 [T], the k of tokens that share; 0 for the others.
        max_k: at least `most` of theirs.
    """
    pieces_TNE = routing.score_pieces(x_TD, router_ED)
    choice, scores_TE = routing.choose(pieces_TNE, k_T, mass_T, max_k)
    return share(scores_TE, choice, shared_T)
