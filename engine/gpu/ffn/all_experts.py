"""The sparse FFN by dense products: what no token chose is zeroed between the two.

This is for batches whose tokens together choose nearly every expert. Then nothing is faster than to
read every weight once, as the dense FFN does. It launches as much as the dense FFN: activation and
choice are applied in place, in one pass over the first product.

Shapes: T tokens, D model, F neurons, E experts, S neurons per expert.
"""

from __future__ import annotations

from torch import Tensor

from engine.gpu._triton import cdiv, jit, tl
from engine.gpu.ffn.activations import activate
from engine.model.activations import ACTIVATIONS, activate_reference


def activate_chosen_reference(h_TF: Tensor, chosen_TE: Tensor, activation: str) -> Tensor:
    """What `activate_chosen` computes, in place too."""
    size = h_TF.shape[1] // chosen_TE.shape[1]
    chosen_TF = chosen_TE.repeat_interleave(size, dim=1)
    return h_TF.copy_(activate_reference(h_TF, activation).masked_fill(~chosen_TF, 0.0))


@jit
def _activate_kernel(
    h_ptr,
    chosen_ptr,
    neurons,
    num_experts,
    expert_size,
    SQUARE: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Program (t, j): BLOCK_F activations of token t."""
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    real = f < neurons
    chosen = tl.load(chosen_ptr + t * num_experts + f // expert_size, mask=real, other=0) != 0
    h = tl.load(h_ptr + t * neurons + f, mask=real & chosen, other=0.0)
    h = activate(h.to(tl.float32), SQUARE)
    tl.store(h_ptr + t * neurons + f, h.to(h_ptr.dtype.element_ty), mask=real)


def activate_blocks() -> dict[str, int]:
    """Block sizes of `_activate_kernel`."""
    return {"BLOCK_F": 1024, "num_warps": 4}


def activate_chosen(h_TF: Tensor, chosen_TE: Tensor, activation: str) -> Tensor:
    """ReLU or its square of the chosen experts' neurons, zero for the others; in place.

    Args:
        h_TF: [T, F], contiguous, float32, bfloat16 or float16; T >= 1. Overwritten and returned.
        chosen_TE: bool [T, E], contiguous.
        activation: one of ACTIVATIONS.
    """
    assert activation in ACTIVATIONS
    assert h_TF.is_contiguous()
    assert chosen_TE.is_contiguous()
    (num_tokens, neurons), num_experts = h_TF.shape, chosen_TE.shape[1]
    blocks = activate_blocks()
    _activate_kernel[(num_tokens, cdiv(neurons, blocks["BLOCK_F"]))](
        h_TF,
        chosen_TE,
        neurons,
        num_experts,
        neurons // num_experts,
        SQUARE=activation == "relu2",
        **blocks,
    )
    return h_TF


def ffn(x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, chosen_TE: Tensor, activation: str) -> Tensor:
    """y [T, D] of the chosen experts, through products with all of them.

    Arguments are those of `activate_chosen`, and weights [F, D], contiguous, dtype of x.
    """
    return activate_chosen(x_TD @ up_FD.T, chosen_TE, activation) @ down_FD
