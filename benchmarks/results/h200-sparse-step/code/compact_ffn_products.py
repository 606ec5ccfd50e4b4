# Triton types a kernel's arguments by itself, at each launch.
# mypy: disable-error-code="no-untyped-def"
"""The sparse FFN for training: groups of similar tokens share one choice of experts.

A training batch has tens of thousands of tokens, and many of them want nearly the same experts. The
tokens are sorted by what suits them best and cut into groups of equal size; the tokens of a group
vote, and the experts with most votes are put together as a compact FFN that the whole group runs
through. All groups' compact FFNs have the same size, so that everything is batched dense products:

    up_NWD, down_NWD = the chosen experts' rows, copied together for each group
    h_NBW = act(x_NBD @ up_NWD.T) * own       y_NBD = h_NBW @ down_NWD
    g_NBW = (dy_NBD @ down_NWD.T) * act'      dx_NBD = g_NBW @ up_NWD
    dup_NWD = g_NBW.T @ x_NBD                 ddown_NWD = h_NBW.T @ dy_NBD

An expert's gradient is the sum over the groups that chose it. The products run at the dense layer's
speed; the copies cost the fewer, the more tokens share a choice. No atomic operation takes part, so
every run gives the same bits.

`own` is one where the expert is among the token's own, those whose score exceeds a threshold; or it
is left out, and a token uses all of its group's experts.

Shapes: T tokens, D model, F neurons, E experts, S neurons per expert, N groups, B tokens per group,
K experts per group, W = K * S neurons per group, R = N * B rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.gpu._triton import cdiv, jit, next_power_of_2, tl
from engine.gpu.ffn.expert_ffn import activate
from engine.gpu.routing.shared_choice import Groups
from engine.model.activations import activate_reference

# --- references ----------------------------------------------------------------------------------


def used_neurons(groups: Groups, neurons: int, group: int, own: bool) -> Tensor:
    """Which neurons each token uses, bool [T, F]."""
    (tokens, experts), order_T = groups.scores_TE.shape, groups.order_T
    group_T = torch.empty_like(order_T)
    group_T[order_T] = torch.arange(tokens, device=order_T.device) // group
    used_TE = groups.slots_NE[group_T] >= 0
    if own:
        used_TE = used_TE & (groups.scores_TE.float() > groups.theta_1)
    return used_TE.repeat_interleave(neurons // experts, 1)


def compact_ffn_reference(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    groups: Groups,
    activation: str,
    group: int = 1024,
    own: bool = False,
) -> Tensor:
    """The same as `compact_ffn`: the dense layer with unused neurons set to zero."""
    used_TF = used_neurons(groups, up_FD.shape[0], group, own)
    h_TF = activate_reference(x_TD @ up_FD.T, activation)
    return h_TF.masked_fill(~used_TF, 0.0) @ down_FD


# --- kernels -------------------------------------------------------------------------------------


@jit
def _take_rows_kernel(
    x_ptr,
    out_ptr,
    order_ptr,
    num_tokens,
    d_model,
    SPREAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[r] = x[order[r]], zeros past the last token; where `SPREAD`, out[order[r]] = x[r]."""
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    token = tl.load(order_ptr + r, mask=r < num_tokens, other=0)
    if SPREAD:
        x = tl.load(x_ptr + r * d_model + d, mask=d < d_model, other=0.0)
        tl.store(out_ptr + token * d_model + d, x, mask=d < d_model)
    else:
        inside = (d < d_model) & (r < num_tokens)
        x = tl.load(x_ptr + token * d_model + d, mask=inside, other=0.0)
        tl.store(out_ptr + r * d_model + d, x, mask=d < d_model)


@jit
def _take_experts_kernel(w_ptr, out_ptr, ids_ptr, expert_elements, BLOCK: tl.constexpr):
    """Program (b, p): block b of the rows of the expert of pair p = group * K + slot."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.program_id(1).to(tl.int64)
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    w = tl.load(w_ptr + expert * expert_elements + i, mask=i < expert_elements, other=0.0)
    tl.store(out_ptr + pair * expert_elements + i, w, mask=i < expert_elements)


@jit
def _sum_experts_kernel(
    parts_ptr,
    out_ptr,
    slots_ptr,
    num_groups,
    num_experts,
    chosen,
    expert_elements,
    BLOCK: tl.constexpr,
):
    """Program (b, e): block b of expert e's rows, summed over its groups in order."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.float32)
    for n in range(num_groups):
        slot = tl.load(slots_ptr + n * num_experts + expert)
        at = parts_ptr + (n * chosen + slot).to(tl.int64) * expert_elements + i
        # A load under a false mask reads nothing, and waits for nothing.
        total += tl.load(at, mask=(i < expert_elements) & (slot >= 0), other=0.0).to(tl.float32)
    at = out_ptr + expert.to(tl.int64) * expert_elements + i
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=i < expert_elements)


@jit
def _activate_kernel(
    h_ptr,
    order_ptr,
    ids_ptr,
    scores_ptr,
    theta_ptr,
    num_tokens,
    num_experts,
    width,
    chosen,
    group,
    SIZE: tl.constexpr,
    SQUARE: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Row r of h, in place: the activation, and zeros where the expert is not the token's own."""
    r = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = j < width
    h = tl.load(h_ptr + r * width + j, mask=inside, other=0.0).to(tl.float32)
    h = activate(h, SQUARE)
    if OWN:
        token = tl.load(order_ptr + r, mask=r < num_tokens, other=0)
        expert = tl.load(ids_ptr + (r // group) * chosen + j // SIZE, mask=inside, other=0)
        score = tl.load(scores_ptr + token * num_experts + expert).to(tl.float32)
        h = tl.where(score > tl.load(theta_ptr), h, 0.0)
    tl.store(h_ptr + r * width + j, h.to(h_ptr.dtype.element_ty), mask=inside)


@jit
def _slope_kernel(g_ptr, h_ptr, elements, SQUARE: tl.constexpr, BLOCK: tl.constexpr):
    """g * act', in place: the slope is 1 where relu is positive, 2 sqrt(h) for its square."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(h_ptr + i, mask=i < elements, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + i, mask=i < elements, other=0.0).to(tl.float32)
    g = g * 2.0 * tl.sqrt(h) if SQUARE else tl.where(h <= 0.0, 0.0, g)
    tl.store(g_ptr + i, g.to(g_ptr.dtype.element_ty), mask=i < elements)


# --- launchers -----------------------------------------------------------------------------------


def take_rows(x_TD: Tensor, groups: Groups, group: int) -> Tensor:
    """The tokens' rows, group by group: [N, B, D]; zeros past the last token."""
    (tokens, d_model), num_groups = x_TD.shape, groups.ids_NK.shape[0]
    out_NBD = x_TD.new_empty((num_groups, group, d_model))
    _take_rows_kernel[(num_groups * group,)](
        x_TD,
        out_NBD,
        groups.order_T,
        tokens,
        d_model,
        SPREAD=False,
        BLOCK_D=next_power_of_2(d_model),
        num_warps=4,
    )
    return out_NBD


def spread_rows(y_NBD: Tensor, groups: Groups) -> Tensor:
    """The inverse of `take_rows`: [T, D]."""
    tokens, d_model = groups.order_T.numel(), y_NBD.shape[2]
    out_TD = y_NBD.new_empty((tokens, d_model))
    _take_rows_kernel[(tokens,)](
        y_NBD,
        out_TD,
        groups.order_T,
        tokens,
        d_model,
        SPREAD=True,
        BLOCK_D=next_power_of_2(d_model),
        num_warps=4,
    )
    return out_TD


def take_experts(w_FD: Tensor, groups: Groups) -> Tensor:
    """The rows of each group's experts: [N, W, D]."""
    (neurons, d_model), experts = w_FD.shape, groups.slots_NE.shape[1]
    num_groups, chosen = groups.ids_NK.shape
    elements = neurons // experts * d_model
    out_NWD = w_FD.new_empty((num_groups, chosen * (neurons // experts), d_model))
    _take_experts_kernel[(cdiv(elements, 4096), num_groups * chosen)](
        w_FD, out_NWD, groups.ids_NK, elements, BLOCK=4096, num_warps=8
    )
    return out_NWD


def sum_experts(parts_NWD: Tensor, groups: Groups) -> Tensor:
    """Each expert's rows, summed in float32 over the groups that chose it: [F, D].

    An expert that no group chose gets exact zeros.
    """
    (num_groups, width, d_model), experts = parts_NWD.shape, groups.slots_NE.shape[1]
    chosen = groups.ids_NK.shape[1]
    elements = width // chosen * d_model
    out_FD = parts_NWD.new_empty((experts * (width // chosen), d_model))
    _sum_experts_kernel[(cdiv(elements, 1024), experts)](
        parts_NWD,
        out_FD,
        groups.slots_NE,
        num_groups,
        experts,
        chosen,
        elements,
        BLOCK=1024,
        num_warps=4,
    )
    return out_FD


def activate_rows(h_NBW: Tensor, groups: Groups, activation: str, own: bool) -> Tensor:
    """The activation of h, in place, with zeros where `own` and the expert is not the token's."""
    num_groups, group, width = h_NBW.shape
    (tokens, experts), chosen = groups.scores_TE.shape, groups.ids_NK.shape[1]
    block = min(2048, next_power_of_2(width))
    _activate_kernel[(num_groups * group, cdiv(width, block))](
        h_NBW,
        groups.order_T,
        groups.ids_NK,
        groups.scores_TE,
        groups.theta_1,
        tokens,
        experts,
        width,
        chosen,
        group,
        SIZE=width // chosen,
        SQUARE=activation == "relu2",
        OWN=own,
        BLOCK_W=block,
        num_warps=4,
    )
    return h_NBW


def times_slope(g_NBW: Tensor, h_NBW: Tensor, activation: str) -> Tensor:
    """g * act', in place, the slope read off the activation h."""
    elements = h_NBW.numel()
    _slope_kernel[(cdiv(elements, 4096),)](
        g_NBW, h_NBW, elements, SQUARE=activation == "relu2", BLOCK=4096, num_warps=8
    )
    return g_NBW


# --- operators -----------------------------------------------------------------------------------

_GROUPS = "Tensor order_T, Tensor ids_NK, Tensor slots_NE, Tensor scores_TE, Tensor theta_1"


@torch.library.custom_op(
    "ambidex::compact_ffn",
    mutates_args=(),
    schema=f"(Tensor x_TD, Tensor up_FD, Tensor down_FD, {_GROUPS}, str activation, int group,"
    " bool own) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    order_T: Tensor,
    ids_NK: Tensor,
    slots_NE: Tensor,
    scores_TE: Tensor,
    theta_1: Tensor,
    activation: str,
    group: int,
    own: bool,
) -> tuple[Tensor, ...]:
    """y [T, D] and, for the backward pass, x [N, B, D], up and down [N, W, D] and h [N, B, W]."""
    groups = Groups(order_T, ids_NK, slots_NE, scores_TE, theta_1)
    x_NBD = take_rows(x_TD, groups, group)
    up_NWD, down_NWD = take_experts(up_FD, groups), take_experts(down_FD, groups)
    h_NBW = activate_rows(torch.bmm(x_NBD, up_NWD.mT), groups, activation, own)
    return (
        spread_rows(torch.bmm(h_NBW, down_NWD), groups),
        x_NBD,
        up_NWD,
        down_NWD,
        h_NBW,
    )


@_forward.register_fake
def _forward_shapes(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    order_T: Tensor,
    ids_NK: Tensor,
    slots_NE: Tensor,
    scores_TE: Tensor,
    theta_1: Tensor,
    activation: str,
    group: int,
    own: bool,
) -> tuple[Tensor, ...]:
    (num_groups, chosen), d_model = ids_NK.shape, x_TD.shape[1]
    width = chosen * (up_FD.shape[0] // slots_NE.shape[1])
    return (
        torch.empty_like(x_TD),
        x_TD.new_empty((num_groups, group, d_model)),
        x_TD.new_empty((num_groups, width, d_model)),
        x_TD.new_empty((num_groups, width, d_model)),
        x_TD.new_empty((num_groups, group, width)),
    )


@torch.library.custom_op(
    "ambidex::compact_ffn_backward",
    mutates_args=(),
    schema="(Tensor dy_TD, Tensor x_NBD, Tensor up_NWD, Tensor down_NWD, Tensor h_NBW,"
    f" {_GROUPS}, str activation) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    dy_TD: Tensor,
    x_NBD: Tensor,
    up_NWD: Tensor,
    down_NWD: Tensor,
    h_NBW: Tensor,
    order_T: Tensor,
    ids_NK: Tensor,
    slots_NE: Tensor,
    scores_TE: Tensor,
    theta_1: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x [T, D], up and down [F, D]."""
    groups = Groups(order_T, ids_NK, slots_NE, scores_TE, theta_1)
    dy_NBD = take_rows(dy_TD.contiguous(), groups, x_NBD.shape[1])
    g_NBW = times_slope(torch.bmm(dy_NBD, down_NWD.mT), h_NBW, activation)
    return (
        spread_rows(torch.bmm(g_NBW, up_NWD), groups),
        sum_experts(torch.bmm(g_NBW.mT, x_NBD), groups),
        sum_experts(torch.bmm(h_NBW.mT, dy_NBD), groups),
    )


@_backward.register_fake
def _backward_shapes(
    dy_TD: Tensor,
    x_NBD: Tensor,
    up_NWD: Tensor,
    down_NWD: Tensor,
    h_NBW: Tensor,
    order_T: Tensor,
    ids_NK: Tensor,
    slots_NE: Tensor,
    scores_TE: Tensor,
    theta_1: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    neurons = up_NWD.shape[1] // ids_NK.shape[1] * slots_NE.shape[1]
    dw = [up_NWD.new_empty((neurons, up_NWD.shape[2])) for _ in range(2)]
    return dy_TD.new_empty(dy_TD.shape), dw[0], dw[1]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, _, *groups, ctx.activation, _, _ = inputs
    ctx.save_for_backward(*output[1:], *groups)
    # The other outputs leave this file for nobody: their gradients are absent, not zeros.
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy_TD: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    gradients = _backward(dy_TD, *ctx.saved_tensors, ctx.activation)
    return *gradients, *(None,) * 8


_forward.register_autograd(_gradients, setup_context=_save)


def compact_ffn(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    groups: Groups,
    activation: str,
    group: int = 1024,
    own: bool = False,
) -> Tensor:
    """y [T, D] of what the groups chose; differentiable, once, in x, up and down.

    Args:
        x_TD: [T, D], float32, bfloat16 or float16; T >= 1.
        up_FD, down_FD: [F, D], dtype of x; expert e owns rows e*S .. (e+1)*S.
        groups: from `share_choice`, for the same tokens and group size.
        activation: "relu" or "relu2".
        group: B, tokens that share a choice.
        own: whether a token uses only its own experts among its group's.
    """
    return _forward(x_TD, up_FD, down_FD, *groups, activation, group, own)[0]
