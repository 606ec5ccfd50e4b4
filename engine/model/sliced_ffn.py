"""The sparse FFN that training uses: expert by expert, forward and backward, on any device.

Token-expert pairs are sorted by expert. Each expert gathers its tokens' rows of x into a scratch
buffer, multiplies by its slice of `up` and of `down`, and adds the result to its tokens' rows of
the output. The backward pass gathers the same rows again instead of keeping them (the pairs of 8
experts per token hold eight times the input) and writes each expert's weight gradients straight
into its slice of one buffer. So what is allocated is the output, the gradients and the activations
of the chosen pairs, everything in between stays in the cache, and an unchosen pair costs nothing.

Within one expert every token occurs once at most, so all sums have one fixed order: two runs give
the same bits.

Shapes: T tokens, D model, F neurons, E experts, S neurons per expert, P token-expert pairs, n pairs
of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.model.activations import ACTIVATIONS, activate_reference


def sparse_ffn_reference(
    x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, chosen_TE: Tensor, activation: str
) -> Tensor:
    """What `sparse_ffn` computes: the dense FFN with unchosen experts' activations zeroed."""
    size = up_FD.shape[0] // chosen_TE.shape[1]
    chosen_TF = chosen_TE.repeat_interleave(size, dim=1)
    return (activate_reference(x_TD @ up_FD.T, activation) * chosen_TF) @ down_FD


def sparse_ffn(
    x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, chosen_TE: Tensor, activation: str
) -> Tensor:
    """The chosen experts only, by slices; differentiable (once) in x, up and down.

    Args:
        x_TD: inputs [T, D].
        up_FD, down_FD: weights [F, D]; expert e owns rows e*S .. (e+1)*S.
        chosen_TE: bool [T, E]; a token may have none.
        activation: "relu" or "relu2".

    Returns:
        [T, D]; zero for a token without an expert.
    """
    assert activation in ACTIVATIONS
    expert_P, token_P = chosen_TE.T.nonzero(as_tuple=True)
    counts_E = torch.bincount(expert_P, minlength=chosen_TE.shape[1]).tolist()
    y_TD: Tensor = _SparseFFN.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        x_TD, up_FD, down_FD, token_P, counts_E, activation == "relu2"
    )
    return y_TD


def _experts(counts_E: list[int], size: int) -> Iterator[tuple[slice, slice]]:
    """(weight rows, pairs) of every expert that has pairs."""
    end = 0
    for expert, count in enumerate(counts_E):
        start, end = end, end + count
        if count:
            yield slice(expert * size, (expert + 1) * size), slice(start, end)


class _SparseFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        up_FD: Tensor,
        down_FD: Tensor,
        token_P: Tensor,
        counts_E: list[int],
        square: bool,
    ) -> Tensor:
        size = up_FD.shape[0] // len(counts_E)
        hidden_PS = x_TD.new_empty(token_P.numel(), size)
        gathered, product = x_TD.new_empty(2, max(counts_E), x_TD.shape[1])
        y_TD = torch.zeros_like(x_TD)
        for rows, pairs in _experts(counts_E, size):
            token_n, hidden_nS = token_P[pairs], hidden_PS[pairs]
            count = token_n.numel()
            x_nD = torch.index_select(x_TD, 0, token_n, out=gathered[:count])
            torch.mm(x_nD, up_FD[rows].T, out=hidden_nS).relu_()
            weight_nS = hidden_nS.square() if square else hidden_nS
            y_TD.index_add_(0, token_n, torch.mm(weight_nS, down_FD[rows], out=product[:count]))
        ctx.save_for_backward(x_TD, up_FD, down_FD, token_P, hidden_PS)
        ctx.counts_E, ctx.square = counts_E, square
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, up_FD, down_FD, token_P, hidden_PS = ctx.saved_tensors
        counts_E: list[int] = ctx.counts_E
        # Every expert that has pairs overwrites its slice; only the others need zeros.
        blank = torch.empty_like if min(counts_E) else torch.zeros_like
        grad_up_FD, grad_down_FD = blank(up_FD), blank(down_FD)
        grad_x_TD = torch.zeros_like(x_TD)
        size = hidden_PS.shape[1]
        gathered, product = x_TD.new_empty(2, max(counts_E), x_TD.shape[1])
        for rows, pairs in _experts(counts_E, size):
            token_n, hidden_nS = token_P[pairs], hidden_PS[pairs]
            count = token_n.numel()
            grad_nD = torch.index_select(grad_TD, 0, token_n, out=gathered[:count])
            weight_nS = hidden_nS.square() if ctx.square else hidden_nS
            torch.mm(weight_nS.T, grad_nD, out=grad_down_FD[rows])
            grad_nS = grad_nD @ down_FD[rows].T
            if ctx.square:
                grad_nS.mul_(hidden_nS).mul_(2)
            else:
                grad_nS.masked_fill_(hidden_nS <= 0, 0)
            x_nD = torch.index_select(x_TD, 0, token_n, out=gathered[:count])
            torch.mm(grad_nS.T, x_nD, out=grad_up_FD[rows])
            grad_x_TD.index_add_(0, token_n, torch.mm(grad_nS, up_FD[rows], out=product[:count]))
        return grad_x_TD, grad_up_FD, grad_down_FD, None, None, None
