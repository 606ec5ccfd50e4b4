"""The sparse FFN for many tokens, without gradients: `gather` and `spread` of `products`.

Time is arithmetic here: every token is multiplied with its own experts alone, on the tensor cores.
`training` has the same products with their gradients.

Shapes: T tokens, D model, F neurons, E experts, S neurons per expert, K slots per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.gpu.ffn.products import Pairs, gather, spread, supports_tma
from engine.gpu.routing.pairs import SortedPairs
from engine.model.activations import ACTIVATIONS, hidden_reference

# Mean pairs of an expert from which weights come by TMA, where that is possible.
LEAST_PAIRS_FOR_TMA = 64


def ffn_reference(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    pairs: SortedPairs,
    activation: str,
    *,
    gate_FD: Tensor | None = None,
    up_bias_F: Tensor | None = None,
    down_bias_D: Tensor | None = None,
    threshold: float = 0.0,
) -> Tensor:
    """What `ffn` computes, expert by expert, in float32 or the inputs' float64."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    num_experts = pairs.counts_E.numel()
    size = up_FD.shape[0] // num_experts
    y_TD = torch.zeros_like(x_TD, dtype=wide)
    if down_bias_D is not None:
        y_TD += down_bias_D.to(wide)
    offsets = pairs.offsets_E1.tolist()
    for expert in range(num_experts):
        rows = slice(expert * size, (expert + 1) * size)
        gate = None if gate_FD is None else gate_FD[rows]
        bias = None if up_bias_F is None else up_bias_F[rows]
        tokens = pairs.pair_token_P[offsets[expert] : offsets[expert + 1]].long()
        x_nD = x_TD[tokens].to(wide)
        h_nS = hidden_reference(x_nD, up_FD[rows], activation, gate, bias, threshold)
        y_TD[tokens] += h_nS @ down_FD[rows].to(wide)
    return y_TD.to(x_TD.dtype)


def ffn(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    pairs: SortedPairs,
    activation: str,
    *,
    gate_FD: Tensor | None = None,
    up_bias_F: Tensor | None = None,
    down_bias_D: Tensor | None = None,
    threshold: float = 0.0,
    tma: bool | None = None,
) -> Tensor:
    """y [T, D] of the chosen experts, accumulated in float32, in the dtype of x; no gradients.

    Between the products, activations and each pair's result are rounded to the dtype of x. Scratch
    memory is T * K * (S + D) elements, so a batch whose tokens use every expert is better served by
    the dense FFN, which is the same function.

    Args:
        x_TD: [T, D], float32, bfloat16 or float16; T >= 1.
        up_FD, down_FD: [F, D], contiguous, dtype of x; expert e owns rows e*S .. (e+1)*S.
        pairs: from `sort_pairs`, of the same tokens.
        activation: one of MORE_ACTIVATIONS.
        gate_FD: as `up_FD`, in gated models; `activations` has the formula.
        up_bias_F, down_bias_D: contiguous, any float type.
        threshold: of "fatrelu".
        tma: whether weights come by TMA; None: where that is possible and pairs are many enough.
    """
    assert up_FD.is_contiguous()
    assert down_FD.is_contiguous()
    assert gate_FD is None or gate_FD.is_contiguous()
    x_TD, order = x_TD.contiguous(), Pairs.of(pairs)
    if tma is None:
        plain = gate_FD is None and up_bias_F is None and activation in ACTIVATIONS
        enough = plain and order.mean_pairs >= LEAST_PAIRS_FOR_TMA
        tma = enough and supports_tma(x_TD, up_FD.shape[0] // order.num_experts)
    h_PS = gather(
        x_TD,
        up_FD,
        order,
        activation,
        gate_FD=gate_FD,
        up_bias_F=up_bias_F,
        threshold=threshold,
        tma=tma,
    )
    return spread(h_PS, down_FD, order, down_bias_D, tma=tma)
