"""The choice of few tokens, by the rule of `rule`, in one launch: norm, scores and choice.

Program (n, r, t) computes piece n of the scores of a block of experts for token t, from a block of
the router that it holds in registers; the last program of a token to arrive adds the pieces and
chooses. A token's choice is the same, bit for bit, in any company. Each token reads the router
anew, from the cache, so this is for few of them; for more, `choose_many` reads the router less
often.

Shapes: T tokens, D model, E experts, N pieces of a score, K = max_k slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.gpu._triton import (
    cdiv,
    chain,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    next_power_of_2,
    tl,
)
from engine.gpu.add_norm import Norm, normed_reference
from engine.gpu.arrivals import Arrivals
from engine.gpu.routing.rule import (
    MAX_EXPERTS,
    Choice,
    choose_scores_reference,
    choose_token,
    choose_token_blocks,
)

# Elements of D that one piece of a score sums, and the experts of one program.
PIECE_D = 256
ROUTER_ROWS = 64

# With more tokens, `choose_many` is faster.
MOST_TOKENS = 64


def choose_few_reference(
    x_TD: Tensor,
    router_ED: Tensor,
    k_T: Tensor,
    mass_T: Tensor,
    max_k: int,
    norm: Norm | None = None,
) -> Choice:
    """What `choose_few` computes, by sorting."""
    scores_TE = normed_reference(x_TD, norm) @ router_ED.T
    return choose_scores_reference(scores_TE, k_T, mass_T, max_k)


@jit
def _choose_few_kernel(
    x_ptr,
    norm_ptr,
    router_ptr,
    k_ptr,
    mass_ptr,
    pieces_ptr,
    scores_ptr,
    arrived_ptr,
    chosen_ptr,
    ids_ptr,
    num_experts,
    d_model,
    max_k,
    epsilon,
    NORMED: tl.constexpr,
    CHAINED: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (n, r, t): piece n of the scores of BLOCK_R experts for token t."""
    # 1. Fetch the router's block, which no kernel writes, while the kernel before still runs.
    piece = tl.program_id(0)
    pieces = tl.num_programs(0)
    t = tl.program_id(2).to(tl.int64)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = piece * PIECE + tl.arange(0, PIECE)
    in_r, in_d = r < num_experts, d < d_model
    router = tl.load(
        router_ptr + r[:, None] * d_model + d[None, :],
        mask=in_r[:, None] & in_d[None, :],
        other=0.0,
    ).to(tl.float32)
    if NORMED:
        norm = tl.load(norm_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()

    # 2. Write this piece of the scores. The norm's factor is common to all experts and left out.
    x = tl.load(x_ptr + t * d_model + d, mask=in_d, other=0.0).to(tl.float32)
    if NORMED:
        x = x * norm
    at = pieces_ptr + (t * pieces + piece) * num_experts + r
    tl.store(at, tl.sum(router * x[None, :], axis=1), mask=in_r)
    factor = 1.0
    if NORMED:  # every program has the time to compute the factor, and any may be the last
        whole = tl.arange(0, BLOCK_D)
        row = tl.load(x_ptr + t * d_model + whole, mask=whole < d_model, other=0.0)
        row = row.to(tl.float32)
        factor = 1.0 / tl.sqrt(tl.sum(row * row, axis=0) / d_model + epsilon)

    # 3. The token's last program chooses: all of a program's scores are written before it counts
    # itself.
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + t, 1, sem="acq_rel") == pieces * tl.num_programs(1) - 1:
        tl.store(arrived_ptr + t, 0)
        choose_token(
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
            BLOCK_N,
            BLOCK_E,
            BLOCK_J,
            BLOCK_K,
        )


def choose_few_blocks(num_experts: int, d_model: int, max_k: int) -> dict[str, int]:
    """Block sizes of `_choose_few_kernel`."""
    choose = choose_token_blocks(num_experts, cdiv(d_model, PIECE_D), max_k)
    return {
        **choose,
        "PIECE": PIECE_D,
        "BLOCK_R": min(ROUTER_ROWS, next_power_of_2(num_experts)),
        "BLOCK_D": next_power_of_2(d_model),
        "num_warps": 8,
    }


def choose_few(
    x_TD: Tensor,
    router_ED: Tensor,
    k_T: Tensor,
    mass_T: Tensor,
    max_k: int,
    arrivals: Arrivals,
    norm: Norm | None = None,
    chosen_TE: Tensor | None = None,
) -> Choice:
    """The choice of every token, from scores norm(x) @ router.T in float32.

    Args:
        x_TD: contiguous, any float type; T >= 1.
        router_ED: float32, contiguous; E <= MAX_EXPERTS.
        k_T, mass_T, max_k: as for `choose_many.choose_pieces`.
        arrivals: counters that no kernel of another stream uses at the same time.
        norm: of x, if any.
        chosen_TE: bool, contiguous; where to write the choice, if given.
    """
    (num_tokens, d_model), num_experts = x_TD.shape, router_ED.shape[0]
    assert x_TD.is_contiguous()
    assert router_ED.is_contiguous()
    assert router_ED.dtype == torch.float32
    assert 1 <= max_k <= num_experts <= MAX_EXPERTS
    assert k_T.dtype == torch.int32
    assert mass_T.dtype == torch.float32
    device = x_TD.device
    if chosen_TE is None:
        chosen_TE = torch.empty((num_tokens, num_experts), dtype=torch.bool, device=device)
    assert chosen_TE.is_contiguous()
    ids_TK = torch.empty((num_tokens, max_k), dtype=torch.int32, device=device)
    blocks = choose_few_blocks(num_experts, d_model, max_k)
    pieces = cdiv(d_model, blocks["PIECE"])
    pieces_TNE = torch.empty((num_tokens, pieces, num_experts), dtype=torch.float32, device=device)
    _choose_few_kernel[(pieces, cdiv(num_experts, blocks["BLOCK_R"]), num_tokens)](
        x_TD,
        x_TD if norm is None else norm.weight_D,
        router_ED,
        k_T.contiguous(),
        mass_T.contiguous(),
        pieces_TNE,
        torch.empty((num_tokens, num_experts), dtype=torch.float32, device=device),
        arrivals.of("route", num_tokens),
        chosen_TE,
        ids_TK,
        num_experts,
        d_model,
        max_k,
        epsilon=0.0 if norm is None else norm.epsilon,
        NORMED=norm is not None,
        **blocks,
        **chain(device),
    )
    return Choice(chosen_TE, ids_TK)
