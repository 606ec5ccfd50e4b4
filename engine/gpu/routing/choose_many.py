"""The choice of many tokens, by the rule of `rule`, in two launches.

`_scores_kernel` multiplies tokens with the router on the tensor cores; `_choose_kernel` takes a
token a program and applies the rule. Nothing waits for the device. A token's choice does not depend
on the rest of the batch, not even in the last bit of a score. For few tokens, `choose_few` does the
same in one launch.

Shapes: T tokens, D model, E experts, N pieces of a score, K = max_k slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.gpu._triton import cdiv, jit, next_power_of_2, tl
from engine.gpu.routing.rule import (
    MAX_EXPERTS,
    Choice,
    choose_scores_reference,
    choose_token,
    choose_token_blocks,
)

# A token's scores are sums of pieces over this many elements of D, computed side by side: with few
# tokens, what takes time is the length of one program's loop.
PIECE_D = 256


def choose_many_reference(
    x_TD: Tensor, router_ED: Tensor, k_T: Tensor, mass_T: Tensor, max_k: int
) -> Choice:
    """What `choose_many` computes, by sorting."""
    return choose_scores_reference(x_TD.float() @ router_ED.float().T, k_T, mass_T, max_k)


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


def choose_pieces(pieces_TNE: Tensor, k_T: Tensor, mass_T: Tensor, max_k: int) -> Choice:
    """The choice from scores that are the sums of pieces.

    Args:
        pieces_TNE: [T, N, E], any float type; T >= 1, E <= MAX_EXPERTS. Scores that are known
            already are one piece.
        k_T: int32 [T], the most experts of each token; values above max_k count as max_k.
        mass_T: float32 [T], the share of predicted mass at which a token has enough.
        max_k: the width of `ids_TK`, 1 .. E.
    """
    num_tokens, pieces, num_experts = pieces_TNE.shape
    assert num_tokens >= 1
    assert 1 <= max_k <= num_experts <= MAX_EXPERTS
    assert k_T.shape == mass_T.shape == (num_tokens,)
    assert k_T.dtype == torch.int32
    assert mass_T.dtype == torch.float32
    device = pieces_TNE.device
    chosen_TE = torch.empty((num_tokens, num_experts), dtype=torch.bool, device=device)
    ids_TK = torch.empty((num_tokens, max_k), dtype=torch.int32, device=device)
    _choose_kernel[(num_tokens,)](
        pieces_TNE.contiguous(),
        torch.empty((num_tokens, num_experts), dtype=torch.float32, device=device),
        k_T.contiguous(),
        mass_T.contiguous(),
        chosen_TE,
        ids_TK,
        num_experts,
        pieces,
        max_k,
        **choose_token_blocks(num_experts, pieces, max_k),
    )
    return Choice(chosen_TE, ids_TK)


def choose_many(x_TD: Tensor, router_ED: Tensor, k_T: Tensor, mass_T: Tensor, max_k: int) -> Choice:
    """The choice of every token, with scores x @ router.T in float32.

    Args:
        x_TD: [T, D], any float type; T >= 1.
        router_ED: [E, D], any float type; E <= MAX_EXPERTS.
        k_T, mass_T, max_k: as for `choose_pieces`.
    """
    assert x_TD.shape[1] == router_ED.shape[1]
    return choose_pieces(score_pieces(x_TD, router_ED), k_T, mass_T, max_k)
