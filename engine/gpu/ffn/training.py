"""The sparse FFN for training: the products over pairs with their gradients.

Three layers: the kernels of `products`; operators that PyTorch knows by name, shapes and
derivative, so that torch.compile takes them whole; and the plain function `ffn` below. Neither pass
computes a pair that was not chosen.

With r = relu(x @ up_e.T), h = r or r^2 and y = sum of h @ down_e over a token's experts, the
backward pass is made of the same products:

    g_PS = (dy[token] @ down_e.T) * act'   gather, with up for down
    dx   = sum of g @ up_e                 spread, likewise
    dup_e = sum of g (x) x[token],  ddown_e = sum of h (x) dy[token]

Of the forward pass it needs x, the weights and h, kept as [P, S]: a pair's S activations are few
beside the D numbers of x that would have to be gathered to compute them anew, and both activations
tell their slope from h.

Shapes: T tokens, D model, F neurons, E experts, S neurons per expert, K slots per token, P = T * K
capacity for pairs, N tiles of pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.gpu._triton import AVAILABLE
from engine.gpu.ffn import products
from engine.gpu.ffn.products import Pairs
from engine.gpu.routing import choose_top_k as routing
from engine.gpu.routing.pairs import SortedPairs
from engine.gpu.routing.rule import MAX_EXPERTS
from engine.model.activations import ACTIVATIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_PAIRS_SCHEMA = "Tensor ids_TK, Tensor offsets_E1, Tensor pair_token_P, Tensor pair_slot_P"


@torch.library.custom_op(
    "ambidex::sparse_ffn",
    mutates_args=(),
    schema=f"(Tensor x_TD, Tensor up_FD, Tensor down_FD, {_PAIRS_SCHEMA}, str activation)"
    " -> (Tensor, Tensor, Tensor)",
)
def _forward(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    ids_TK: Tensor,
    offsets_E1: Tensor,
    pair_token_P: Tensor,
    pair_slot_P: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [T, D], and for the backward pass h [P, S] and the order of the tiles, int32 [N, 2]."""
    tiles_N2 = products.list_tiles(offsets_E1, ids_TK.numel())
    pairs = Pairs(ids_TK, offsets_E1, pair_token_P, pair_slot_P, tiles_N2)
    h_PS = products.gather(x_TD, up_FD, pairs, activation)
    return products.spread(h_PS, down_FD, pairs), h_PS, tiles_N2


@torch.library.custom_op(
    "ambidex::sparse_ffn_backward",
    mutates_args=(),
    schema="(Tensor dy_TD, Tensor x_TD, Tensor up_FD, Tensor down_FD, Tensor h_PS,"
    f" {_PAIRS_SCHEMA}, Tensor tiles_N2, str activation) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    h_PS: Tensor,
    ids_TK: Tensor,
    offsets_E1: Tensor,
    pair_token_P: Tensor,
    pair_slot_P: Tensor,
    tiles_N2: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x [T, D], up and down [F, D]."""
    pairs = Pairs(ids_TK, offsets_E1, pair_token_P, pair_slot_P, tiles_N2)
    dy_TD = dy_TD.contiguous()
    g_PS = products.gather(dy_TD, down_FD, pairs, activation, h_PS=h_PS)
    return (
        products.spread(g_PS, up_FD, pairs),
        products.weights(g_PS, x_TD, pairs),
        products.weights(h_PS, dy_TD, pairs),
    )


@_forward.register_fake
def _forward_shapes(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    ids_TK: Tensor,
    offsets_E1: Tensor,
    pair_token_P: Tensor,
    pair_slot_P: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    num_experts, capacity = offsets_E1.numel() - 1, ids_TK.numel()
    tiles = products.num_listed_tiles(capacity, num_experts)
    return (
        torch.empty_like(x_TD),
        x_TD.new_empty((capacity, up_FD.shape[0] // num_experts)),
        offsets_E1.new_empty((tiles, 2)),
    )


@_backward.register_fake
def _backward_shapes(
    dy_TD: Tensor,
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    h_PS: Tensor,
    ids_TK: Tensor,
    offsets_E1: Tensor,
    pair_token_P: Tensor,
    pair_slot_P: Tensor,
    tiles_N2: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x_TD), torch.empty_like(up_FD), torch.empty_like(down_FD)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.activation = inputs
    x_TD, up_FD, down_FD, *pairs = tensors
    _, h_PS, tiles_N2 = output
    ctx.save_for_backward(x_TD, up_FD, down_FD, h_PS, *pairs, tiles_N2)
    # Nobody outside of this file sees h, so nobody sends a gradient of it. PyTorch would pass a
    # tensor of zeros in its place; now it passes None.
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy_TD: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    gradients = _backward(dy_TD, *ctx.saved_tensors, ctx.activation)
    return *gradients, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op(
    "ambidex::choose_top_k",
    mutates_args=(),
    schema="(Tensor scores_TE, int k) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _choose_top_k(scores_TE: Tensor, k: int) -> tuple[Tensor, ...]:
    return tuple(routing.choose_top_k(scores_TE, k))


@_choose_top_k.register_fake
def _choose_top_k_shapes(scores_TE: Tensor, k: int) -> tuple[Tensor, ...]:
    tokens, experts = scores_TE.shape
    pairs = (tokens * k,)
    return (
        scores_TE.new_empty((tokens, experts), dtype=torch.bool),
        *(
            scores_TE.new_empty(shape, dtype=torch.int32)
            for shape in ((tokens, k), (experts,), (experts + 1,), pairs, pairs)
        ),
    )


def choose_top_k(scores_TE: Tensor, k: int) -> SortedPairs:
    """`routing.choose_top_k.choose_top_k`, which torch.compile takes whole; no gradients."""
    return SortedPairs(*_choose_top_k(scores_TE, k))


def _compute_dtype(x_TD: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's if it is on for this device, else that of x."""
    kind = x_TD.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_TD.dtype


def supports(x_TD: Tensor, num_experts: int) -> bool:
    """Whether `choose_top_k` and `ffn` can take this input: CUDA, Triton, sizes, dtype."""
    return (
        x_TD.is_cuda
        and AVAILABLE
        and x_TD.shape[0] >= 1
        and num_experts <= MAX_EXPERTS
        and _compute_dtype(x_TD) in DTYPES
    )


def ffn(
    x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, pairs: SortedPairs, activation: str
) -> Tensor:
    """y [T, D] of the chosen experts; differentiable, once, in x, up and down.

    Neither pass computes an unchosen pair, and every run gives the same bits. Products accumulate
    in float32; activations, their gradients and each pair's result are rounded to the dtype of the
    products, which is autocast's where it is on and else that of x. Weights of another dtype
    (float32 masters) are cast once, and their gradients come in their own dtype. An expert that no
    token chose gets gradients of exact zeros. Scratch memory is T * K * (S + D) elements in either
    pass, of which T * K * S wait for the backward pass.

    Args:
        x_TD: [T, D], float32, bfloat16 or float16; T >= 1.
        up_FD, down_FD: [F, D], any float type; expert e owns rows e*S .. (e+1)*S.
        pairs: from `choose_top_k` or `sort_pairs`, of the same tokens.
        activation: one of ACTIVATIONS.
    """
    assert activation in ACTIVATIONS
    dtype = _compute_dtype(x_TD)
    assert dtype in DTYPES
    x_TD, up_FD, down_FD = (tensor.to(dtype).contiguous() for tensor in (x_TD, up_FD, down_FD))
    y_TD, _, _ = _forward(
        x_TD,
        up_FD,
        down_FD,
        pairs.ids_TK,
        pairs.offsets_E1,
        pairs.pair_token_P,
        pairs.pair_slot_P,
        activation,
    )
    assert isinstance(y_TD, Tensor)
    return y_TD
