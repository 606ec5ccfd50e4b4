# Triton types a kernel's arguments by itself, at each launch.
# mypy: disable-error-code="no-untyped-def"
"""The sparse FFN for few tokens: y = sum over a token's experts of h_e @ down_e.

The activations h are act(x @ up.T); with biases act(x @ up.T + up_bias), and down_bias added once
per token, whatever its experts; in gated models act(x @ gate.T) * (x @ up.T + up_bias).

With few tokens time is the bytes of the chosen rows over the memory's bandwidth, so the kernel
reads each pair's rows once, in wide loads along D, and does no work in tiles that tensor cores
would want. Tokens that share an expert read it again, through the cache: past a few pairs
`grouped_ffn` wins, and benchmarks/gpu.py measures where.

Program (pair, block) takes one token, one of its experts and a few of that expert's neurons: it
reads their rows of `up`, reduces them to activations in registers and at once weighs their rows of
`down` into a partial sum over D. Rows of `down` whose neuron ReLU has silenced are not read, unless
a tile is EAGER and fetches them beside `up`, not after it. A second launch adds the partial sums in
a fixed order.

How a pair is cut into blocks depends on the expert's size alone, and unused slots add exact zeros.
So a token's output is the same, bit for bit, in any run and in any company.

Shapes: T tokens, D model, F neurons, S neurons per expert, K slots per token, B blocks per pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels._triton import cdiv, jit, next_power_of_2, tl

ACTIVATIONS = ("relu", "relu2")

# A pair is cut into about this many programs: 6 experts then occupy a whole GPU with one token.
BLOCKS_PER_PAIR = 24

# Elements of `up` that one program holds at most: 128 a thread with 8 warps.
TILE_ELEMENTS = 32768


def activate_reference(x: Tensor, activation: str) -> Tensor:
    """ReLU or its square; NaN stays NaN."""
    assert activation in ACTIVATIONS
    positive = x.relu()
    return positive if activation == "relu" else positive.square()


def hidden_reference(
    x_TD: Tensor,
    up_ND: Tensor,
    activation: str,
    gate_ND: Tensor | None = None,
    up_bias_N: Tensor | None = None,
) -> Tensor:
    """Activations [T, N] of N neurons, in the dtype of x."""
    up_TN = x_TD @ up_ND.to(x_TD.dtype).T
    if up_bias_N is not None:
        up_TN = up_TN + up_bias_N.to(x_TD.dtype)
    if gate_ND is None:
        return activate_reference(up_TN, activation)
    return activate_reference(x_TD @ gate_ND.to(x_TD.dtype).T, activation) * up_TN


def expert_ffn_reference(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    ids_TK: Tensor,
    expert_size: int,
    activation: str,
    *,
    gate_FD: Tensor | None = None,
    up_bias_F: Tensor | None = None,
    down_bias_D: Tensor | None = None,
) -> Tensor:
    """As `expert_ffn`, token by token and expert by expert, in float32 or the inputs' float64."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = torch.zeros_like(x_TD, dtype=wide)
    if down_bias_D is not None:
        y_TD += down_bias_D.to(wide)
    for token, ids in enumerate(ids_TK.tolist()):
        for expert in ids:
            if expert >= 0:
                rows = slice(expert * expert_size, (expert + 1) * expert_size)
                gate = None if gate_FD is None else gate_FD[rows]
                bias = None if up_bias_F is None else up_bias_F[rows]
                x_1D = x_TD[token : token + 1].to(wide)
                h_1S = hidden_reference(x_1D, up_FD[rows], activation, gate, bias)
                y_TD[token] += (h_1S @ down_FD[rows].to(wide))[0]
    return y_TD.to(x_TD.dtype)


@jit
def activate(x, SQUARE: tl.constexpr):
    """ReLU or its square; NaN stays NaN, which tl.maximum would not keep."""
    positive = tl.where(x < 0.0, 0.0, x)
    if SQUARE:
        positive = positive * positive
    return positive


@jit
def _expert_ffn_kernel(
    x_ptr,
    up_ptr,
    gate_ptr,
    up_bias_ptr,
    down_ptr,
    ids_ptr,
    partial_ptr,
    d_model,
    expert_size,
    max_k,
    SQUARE: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    EAGER: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (i, b): block b of the neurons of pair i = token * max_k + slot."""
    pair = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    expert = tl.load(ids_ptr + pair)
    if expert < 0:
        return
    d = tl.arange(0, BLOCK_D)
    in_d = (d < d_model)[None, :]
    s = block * BLOCK_S + tl.arange(0, BLOCK_S)
    neuron = expert.to(tl.int64) * expert_size + s
    rows = neuron[:, None] * d_model + d[None, :]
    in_rows = (s < expert_size)[:, None] & in_d

    x = tl.load(x_ptr + (pair // max_k) * d_model + d, mask=d < d_model, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)
    if EAGER:
        down = tl.load(down_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)
    h = tl.sum(up * x[None, :], axis=1)
    if BIASED:
        h += tl.load(up_bias_ptr + neuron, mask=s < expert_size, other=0.0).to(tl.float32)
    h = activate(tl.sum(gate * x[None, :], axis=1), SQUARE) * h if GATED else activate(h, SQUARE)
    if not EAGER:
        heard = (h != 0.0) & (s < expert_size)
        down = tl.load(down_ptr + rows, mask=heard[:, None] & in_d, other=0.0).to(tl.float32)
    y = tl.sum(down * h[:, None], axis=0)

    at = (pair * tl.num_programs(1) + block) * d_model
    tl.store(partial_ptr + at + d, y, mask=d < d_model)


@jit
def _sum_kernel(
    partial_ptr,
    ids_ptr,
    down_bias_ptr,
    y_ptr,
    d_model,
    max_k,
    blocks_per_pair,
    BIASED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (t, j): columns j of token t, the sum of its pairs' partial sums in fixed order."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    num_rows = max_k * blocks_per_pair
    y = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for start in range(0, num_rows, BLOCK_B):
        row = start + tl.arange(0, BLOCK_B)
        expert = tl.load(
            ids_ptr + token * max_k + row // blocks_per_pair, mask=row < num_rows, other=-1
        )
        at = (token * num_rows + row)[:, None] * d_model + d[None, :]
        y += tl.load(
            partial_ptr + at, mask=(expert >= 0)[:, None] & (d < d_model)[None, :], other=0.0
        )
    total = tl.sum(y, axis=0)
    if BIASED:
        total += tl.load(down_bias_ptr + d, mask=d < d_model, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * d_model + d, total.to(y_ptr.dtype.element_ty), mask=d < d_model)


def ffn_blocks(d_model: int, expert_size: int) -> dict[str, int]:
    """Block sizes of `_expert_ffn_kernel`; they must not depend on the number of tokens."""
    block_d = next_power_of_2(d_model)
    wanted = max(1, expert_size // BLOCKS_PER_PAIR)
    rows = min(1 << (wanted.bit_length() - 1), max(1, TILE_ELEMENTS // block_d))
    return tile(d_model, rows)


def tile(d_model: int, rows: int, elements: int = 1024, *, eager: bool = False) -> dict[str, int]:
    """A tile of so many neurons: about `elements` of `up` a warp, from 2 to 8 warps."""
    block_d = next_power_of_2(d_model)
    warps = min(8, max(2, rows * block_d // elements))
    return {"BLOCK_S": rows, "BLOCK_D": block_d, "EAGER": eager, "num_warps": warps}


def sum_blocks() -> dict[str, int]:
    """Block sizes of `_sum_kernel`."""
    return {"BLOCK_B": 256, "BLOCK_D": 32, "num_warps": 8}


def expert_ffn(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    ids_TK: Tensor,
    expert_size: int,
    activation: str,
    *,
    gate_FD: Tensor | None = None,
    up_bias_F: Tensor | None = None,
    down_bias_D: Tensor | None = None,
    blocks: dict[str, int] | None = None,
    last: dict[str, int] | None = None,
) -> Tensor:
    """y [T, D] of the chosen experts, accumulated in float32, in the dtype of x.

    Args:
        x_TD: [T, D], float32, bfloat16 or float16; T >= 1.
        up_FD, down_FD: [F, D], contiguous, dtype of x; expert e owns rows e*S .. (e+1)*S.
        ids_TK: int32 [T, K], the experts of each token, -1 in unused slots, which come last.
        expert_size: S.
        activation: one of ACTIVATIONS.
        gate_FD: as `up_FD`, in gated models.
        up_bias_F, down_bias_D: contiguous, any float type.
        blocks, last: tiles of both launches, for measurements; None takes `ffn_blocks` and
            `sum_blocks`.
    """
    assert activation in ACTIVATIONS
    assert up_FD.is_contiguous()
    assert down_FD.is_contiguous()
    assert gate_FD is None or gate_FD.is_contiguous()
    assert ids_TK.dtype == torch.int32
    x_TD, ids_TK = x_TD.contiguous(), ids_TK.contiguous()
    (num_tokens, d_model), max_k = x_TD.shape, ids_TK.shape[1]
    blocks = blocks or ffn_blocks(d_model, expert_size)
    pairs, blocks_per_pair = num_tokens * max_k, cdiv(expert_size, blocks["BLOCK_S"])
    partial_PBD = torch.empty(
        (pairs, blocks_per_pair, d_model), dtype=torch.float32, device=x_TD.device
    )
    # What is absent is passed as another tensor, which the kernel then never reads.
    _expert_ffn_kernel[(pairs, blocks_per_pair)](
        x_TD,
        up_FD,
        up_FD if gate_FD is None else gate_FD,
        up_FD if up_bias_F is None else up_bias_F,
        down_FD,
        ids_TK,
        partial_PBD,
        d_model,
        expert_size,
        max_k,
        SQUARE=activation == "relu2",
        GATED=gate_FD is not None,
        BIASED=up_bias_F is not None,
        **blocks,
    )
    y_TD = torch.empty_like(x_TD)
    last = last or sum_blocks()
    _sum_kernel[(num_tokens, cdiv(d_model, last["BLOCK_D"]))](
        partial_PBD,
        ids_TK,
        y_TD if down_bias_D is None else down_bias_D,
        y_TD,
        d_model,
        max_k,
        blocks_per_pair,
        BIASED=down_bias_D is not None,
        **last,
    )
    return y_TD
