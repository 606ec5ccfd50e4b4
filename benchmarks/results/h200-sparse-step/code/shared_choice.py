# Triton types a kernel's arguments by itself, at each launch.
# mypy: disable-error-code="no-untyped-def"
"""One choice of experts for a group of similar tokens, as `compact_ffn` trains with.

The tokens of a batch are sorted by what suits them best and cut into groups of equal size. A token
votes for its own experts, those whose score exceeds a threshold, and a group takes the experts with
most votes. Nothing waits for the device, no atomic operation takes part, and every run gives the
same bits.

A group spans the batch, so that a token's choice depends on the tokens it is grouped with, those
that follow it in its sequence among them. That is for training alone: the router itself, and with
it evaluation and inference, looks at one token at a time.

Shapes: T tokens, E experts, N groups, B tokens per group, K experts per group, G units.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.gpu._triton import cdiv, jit, next_power_of_2, tl

# Consecutive experts that are looked at together when tokens are sorted.
EXPERTS_PER_UNIT = 4

# Tokens whose votes one program counts.
VOTE_TOKENS = 128


class Groups(NamedTuple):
    """Which tokens make a group, and what each group chose.

    Attributes:
        order_T: int64, the tokens, group after group.
        ids_NK: int32, each group's experts in ascending order.
        slots_NE: int32, each expert's place among its group's, -1 where it was not chosen.
        scores_TE: the router's scores.
        theta_1: float32 [1]; a token's own experts score above it.
    """

    order_T: Tensor
    ids_NK: Tensor
    slots_NE: Tensor
    scores_TE: Tensor
    theta_1: Tensor


# --- references ----------------------------------------------------------------------------------


def sort_keys_reference(scores_TE: Tensor) -> Tensor:
    """The same as `sort_keys`, in plain torch."""
    tokens, experts = scores_TE.shape
    per_unit = EXPERTS_PER_UNIT if experts % EXPERTS_PER_UNIT == 0 else 1
    units = experts // per_unit
    sums_TG = scores_TE.float().view(tokens, units, per_unit).sum(2)
    best_T = sums_TG.argmax(1)
    rest_TG = sums_TG.scatter(1, best_T[:, None], float("-inf"))
    return (best_T * units + rest_TG.argmax(1)).int()


def choose_groups_reference(scores_TE: Tensor, theta_1: Tensor, chosen: int, group: int) -> Groups:
    """The same as `choose_groups`, in plain torch."""
    order_T = sort_keys_reference(scores_TE).sort(stable=True).indices
    own_TE = scores_TE.float() > theta_1
    votes_NE = torch.stack([rows.sum(0) for rows in own_TE[order_T].split(group)])
    return _groups_of(order_T, votes_NE, chosen, scores_TE, theta_1)


# --- kernels -------------------------------------------------------------------------------------


@jit
def _key_kernel(
    scores_ptr,
    keys_ptr,
    num_tokens,
    num_units,
    PER_UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Each token's best and second best unit, as one number that sorts by both."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    g = tl.arange(0, BLOCK_G)
    inside = (t < num_tokens)[:, None] & (g < num_units)[None, :]
    at = scores_ptr + (t.to(tl.int64)[:, None] * num_units + g[None, :]) * PER_UNIT
    total = tl.zeros((BLOCK_T, BLOCK_G), tl.float32)
    for i in tl.static_range(PER_UNIT):
        total += tl.load(at + i, mask=inside, other=0.0).to(tl.float32)
    total = tl.where(inside, total, float("-inf"))
    best = tl.max(total, axis=1)[:, None]
    first = tl.min(tl.where(total == best, g[None, :], BLOCK_G), axis=1)
    rest = tl.where(g[None, :] == first[:, None], float("-inf"), total)
    best = tl.max(rest, axis=1)[:, None]
    second = tl.min(tl.where(rest == best, g[None, :], BLOCK_G), axis=1)
    tl.store(keys_ptr + t, first * num_units + second, mask=t < num_tokens)


@jit
def _vote_kernel(
    scores_ptr,
    theta_ptr,
    order_ptr,
    votes_ptr,
    num_tokens,
    num_experts,
    part_tokens,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program p: how many tokens of part p have each expert among their own."""
    part = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    theta = tl.load(theta_ptr)
    votes = tl.zeros((BLOCK_E,), tl.int32)
    for begin in range(0, part_tokens, BLOCK_T):
        r = begin + tl.arange(0, BLOCK_T)
        real = (r < part_tokens) & (part * part_tokens + r < num_tokens)
        token = tl.load(order_ptr + part * part_tokens + r, mask=real, other=0)
        at = scores_ptr + token[:, None] * num_experts + e[None, :]
        inside = real[:, None] & (e < num_experts)[None, :]
        score = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
        votes += tl.sum((score > theta).to(tl.int32), axis=0)
    tl.store(votes_ptr + part * num_experts + e, votes, mask=e < num_experts)


# --- launchers -----------------------------------------------------------------------------------


def sort_keys(scores_TE: Tensor) -> Tensor:
    """Numbers int32 [T] that sort tokens by their best unit, then by their second best.

    A unit is a few consecutive experts, which are alike where a clustering has ordered them.
    """
    tokens, experts = scores_TE.shape
    per_unit = EXPERTS_PER_UNIT if experts % EXPERTS_PER_UNIT == 0 else 1
    units = experts // per_unit
    keys_T = torch.empty((tokens,), dtype=torch.int32, device=scores_TE.device)
    block_g = next_power_of_2(units)
    block_t = max(1, 4096 // block_g)
    _key_kernel[(cdiv(tokens, block_t),)](
        scores_TE,
        keys_T,
        tokens,
        units,
        PER_UNIT=per_unit,
        BLOCK_T=block_t,
        BLOCK_G=block_g,
        num_warps=8,
    )
    return keys_T


def choose_groups(scores_TE: Tensor, theta_1: Tensor, chosen: int, group: int) -> Groups:
    """Sort tokens, cut them into groups of `group`, let each group choose `chosen` experts.

    A token votes for its own experts, those with scores above `theta_1`; ties go to the lower
    index. Nothing waits for the device.

    Args:
        scores_TE: [T, E], contiguous.
        theta_1: float32 [1].
        chosen: K, 1 .. E.
        group: B, a multiple of VOTE_TOKENS or below it.
    """
    tokens, experts = scores_TE.shape
    part = min(group, VOTE_TOKENS)
    assert group % part == 0
    keys_T = sort_keys(scores_TE)
    units = experts // (EXPERTS_PER_UNIT if experts % EXPERTS_PER_UNIT == 0 else 1)
    if units * units < 1 << 15:
        keys_T = keys_T.short()  # half the passes of a radix sort
    order_T = keys_T.sort(stable=True).indices
    num_groups = cdiv(tokens, group)
    parts = num_groups * (group // part)
    votes_PE = torch.empty((parts, experts), dtype=torch.int32, device=scores_TE.device)
    block_e = next_power_of_2(experts)
    _vote_kernel[(parts,)](
        scores_TE,
        theta_1,
        order_T,
        votes_PE,
        tokens,
        experts,
        part,
        BLOCK_T=max(1, min(next_power_of_2(part), 8192 // block_e)),
        BLOCK_E=block_e,
        num_warps=8,
    )
    votes_NE = votes_PE.view(num_groups, -1, experts).sum(1)
    return _groups_of(order_T, votes_NE, chosen, scores_TE, theta_1)


def _groups_of(
    order_T: Tensor, votes_NE: Tensor, chosen: int, scores_TE: Tensor, theta_1: Tensor
) -> Groups:
    """Each group's `chosen` experts with most votes, ties to the lower index."""
    experts = votes_NE.shape[1]
    e = torch.arange(experts, device=votes_NE.device)
    # Distinct numbers, so that no order among equals is left to chance.
    ranked_NE = votes_NE.long() * experts + (experts - 1 - e)
    ids_NK = ranked_NE.topk(chosen, dim=1, sorted=False).indices.sort(1).values
    slots_NE = torch.full_like(votes_NE, -1, dtype=torch.int32)
    places_K = torch.arange(chosen, dtype=torch.int32, device=e.device)
    slots_NE.scatter_(1, ids_NK, places_K.expand_as(ids_NK))
    return Groups(order_T, ids_NK.int(), slots_NE, scores_TE, theta_1)


# --- operator ------------------------------------------------------------------------------------


@torch.library.custom_op(
    "ambidex::choose_groups",
    mutates_args=(),
    schema="(Tensor scores_TE, Tensor theta_1, int chosen, int group) -> (Tensor, Tensor, Tensor)",
)
def _choose(scores_TE: Tensor, theta_1: Tensor, chosen: int, group: int) -> tuple[Tensor, ...]:
    return tuple(choose_groups(scores_TE, theta_1, chosen, group)[:3])


@_choose.register_fake
def _choose_shapes(
    scores_TE: Tensor, theta_1: Tensor, chosen: int, group: int
) -> tuple[Tensor, ...]:
    tokens, experts = scores_TE.shape
    num_groups = cdiv(tokens, group)
    return (
        scores_TE.new_empty((tokens,), dtype=torch.int64),
        scores_TE.new_empty((num_groups, chosen), dtype=torch.int32),
        scores_TE.new_empty((num_groups, experts), dtype=torch.int32),
    )


def share_choice(scores_TE: Tensor, theta_1: Tensor, chosen: int, group: int) -> Groups:
    """`choose_groups`, such that torch.compile takes it whole; no gradients."""
    return Groups(*_choose(scores_TE, theta_1, chosen, group), scores_TE, theta_1)
