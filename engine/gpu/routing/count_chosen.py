"""How many experts a step used, by token and by layer, counted on the device in one launch.

Shapes: L layers, T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.gpu._triton import jit, next_power_of_2, tl


def count_chosen_reference(chosen_LTE: Tensor) -> Tensor:
    """What `count_chosen` computes."""
    counts_LT = chosen_LTE.sum(2)
    union_L = chosen_LTE.any(1).sum(1)
    return torch.cat([counts_LT.sum(0), counts_LT.sum(1), union_L]).int()


@jit
def _count_chosen_kernel(
    chosen_ptr,
    counts_ptr,
    layers,
    num_tokens,
    num_experts,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program i: token i over all layers; then layer i - T over all tokens, and its union."""
    i = tl.program_id(0)
    by_token = i < num_tokens
    layer = i - num_tokens
    # Rows of choices, one after another: a token's layers, or a layer's tokens.
    first = tl.where(by_token, i, layer * num_tokens)
    stride = tl.where(by_token, num_tokens, 1)
    rows = tl.where(by_token, layers, num_tokens)
    e = tl.arange(0, BLOCK_E)[None, :]
    count = 0
    used = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)[:, None]
        at = chosen_ptr + (first + r * stride).to(tl.int64) * num_experts + e
        chosen = tl.load(at, mask=(r < rows) & (e < num_experts), other=0).to(tl.int32)
        count += tl.sum(tl.sum(chosen, axis=1), axis=0)
        used = tl.maximum(used, tl.max(chosen, axis=0))
    tl.store(counts_ptr + i, count)
    tl.store(counts_ptr + layers + i, tl.sum(used, axis=0), mask=i >= num_tokens)


def count_chosen(chosen_LTE: Tensor) -> Tensor:
    """Experts of each token over all layers, of each layer over all tokens, and distinct ones.

    Args:
        chosen_LTE: bool, contiguous; L, T >= 1.

    Returns:
        int32 [T + 2 L]: the tokens' sums, the layers' sums, the layers' distinct experts.
    """
    assert chosen_LTE.is_contiguous()
    layers, num_tokens, num_experts = chosen_LTE.shape
    counts = torch.empty(num_tokens + 2 * layers, dtype=torch.int32, device=chosen_LTE.device)
    block_e = next_power_of_2(num_experts)
    _count_chosen_kernel[(num_tokens + layers,)](
        chosen_LTE,
        counts,
        layers,
        num_tokens,
        num_experts,
        BLOCK_R=max(1, 4096 // block_e),
        BLOCK_E=block_e,
        num_warps=4,
    )
    return counts
