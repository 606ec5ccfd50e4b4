# Triton types a kernel's arguments by itself, at each launch.
# mypy: disable-error-code="no-untyped-def"
"""The sparse FFN for training, tile by tile: similar tokens share one choice of experts.

A training batch has tens of thousands of tokens, and many of them want nearly the same experts. So
tokens are sorted by the part of the FFN that suits them best and cut into tiles; the tokens of a
tile vote, and the tile computes the experts with most votes, for all of its tokens:

    h = act(x @ up[rows].T)     rows: the neurons of the tile's experts
    y = h @ down[rows]

These are products of the dense layer's kind and speed, with rows of the weights read through a list.
The backward pass consists of the same two products and of one that sums, for each expert, over the
tiles that chose it. No atomic operation takes part, so every run gives the same bits.

Optionally a token uses only *its own* experts among the tile's: those whose score exceeds a
threshold. That costs one more step of the first product's sum: -30000 is added where an expert is
not the token's own, and the activation turns it into an exact zero.

A tile chooses *units* of U neurons, one expert or several that follow each other. Wider units make
the weights' gradients cheaper, since a row of x that has been fetched is then used U times.

Shapes: T tokens, D model, F neurons, E experts, S neurons per expert, U neurons per unit, G units,
B tokens per tile, N tiles, R = N * B rows, K units per tile, W = K * U neurons per tile,
P = N * K pairs of a tile and a unit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from engine.kernels._triton import INTERPRETED, cdiv, jit, next_power_of_2, tl
from engine.kernels.expert_ffn import activate, activate_reference
from engine.kernels.top_k import route_top_k
from torch import Tensor

# Programs that keep a GPU of 132 multiprocessors busy to the end of a launch.
ENOUGH_PROGRAMS = 792

# Fewer pairs than this are not worth another partial sum of a whole gradient.
LEAST_PAIRS_PER_SPLIT = 8


class TilePlan(NamedTuple):
    """Which tokens make a tile, and what each tile chose.

    Attributes:
        order_T: int32, the tokens, tile after tile.
        ids_NK: int32, each tile's units in ascending order.
        offsets_G1: int32, where each unit's pairs begin in the next two.
        pair_tile_P: int32, the tiles that chose a unit, in ascending order.
        pair_slot_P: int32, which of its tile's K units it is.
        scores_TE: the router's scores.
        theta_1: float32 [1]; a token's own experts score above it.
    """

    order_T: Tensor
    ids_NK: Tensor
    offsets_G1: Tensor
    pair_tile_P: Tensor
    pair_slot_P: Tensor
    scores_TE: Tensor
    theta_1: Tensor


# --- references ----------------------------------------------------------------------------------


def tile_plan_reference(
    scores_TE: Tensor, theta_1: Tensor, units: int, chosen: int, tile: int
) -> TilePlan:
    """The same as `tile_plan`, in plain torch."""
    tokens = scores_TE.shape[0]
    best_TG = scores_TE.float().view(tokens, units, -1).mean(2).to(scores_TE.dtype)
    order_T = best_TG.argmax(1).sort(stable=True).indices
    own_TE = scores_TE.float() > theta_1
    votes = [rows.sum(0).view(units, -1).sum(1) for rows in own_TE[order_T].split(tile)]
    votes_NG = torch.stack(votes)
    ids_NK = (
        votes_NG.sort(dim=1, descending=True, stable=True)
        .indices[:, :chosen]
        .sort(1)
        .values
    )
    pairs = [
        (unit, n, k)
        for n, ids in enumerate(ids_NK.tolist())
        for k, unit in enumerate(ids)
    ]
    pairs.sort()
    counts = torch.bincount(ids_NK.flatten(), minlength=units)
    offsets_G1 = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    unit_tile_slot = torch.tensor(pairs, dtype=torch.int32, device=scores_TE.device)
    return TilePlan(
        order_T.int(),
        ids_NK.int(),
        offsets_G1.int(),
        unit_tile_slot[:, 1].contiguous(),
        unit_tile_slot[:, 2].contiguous(),
        scores_TE,
        theta_1,
    )


def used_neurons(plan: TilePlan, neurons: int, tile: int, own: bool) -> Tensor:
    """Which neurons each token uses, bool [T, F]."""
    units, experts = plan.offsets_G1.numel() - 1, plan.scores_TE.shape[1]
    device, tokens = plan.order_T.device, plan.order_T.numel()
    used_NG = torch.zeros(
        (plan.ids_NK.shape[0], units), dtype=torch.bool, device=device
    )
    used_NG.scatter_(1, plan.ids_NK.long(), True)
    tile_T = torch.empty(tokens, dtype=torch.int64, device=device)
    tile_T[plan.order_T.long()] = torch.arange(tokens, device=device) // tile
    used_TF = used_NG[tile_T].repeat_interleave(neurons // units, 1)
    if own:
        own_TE = plan.scores_TE.float() > plan.theta_1
        used_TF = used_TF & own_TE.repeat_interleave(neurons // experts, 1)
    return used_TF


def tile_ffn_reference(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    plan: TilePlan,
    activation: str,
    tile: int = 128,
    own: bool = False,
) -> Tensor:
    """The same as `tile_ffn`: the dense layer with unused neurons set to zero."""
    used_TF = used_neurons(plan, up_FD.shape[0], tile, own)
    h_TF = activate_reference(x_TD @ up_FD.T, activation)
    return h_TF.masked_fill(~used_TF, 0.0) @ down_FD


# --- kernels: the plan ---------------------------------------------------------------------------


@jit
def _vote_kernel(
    scores_ptr,
    theta_ptr,
    order_ptr,
    votes_ptr,
    num_tokens,
    num_experts,
    tile_tokens,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program n: how many tokens of tile n have each expert among their own."""
    tile = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    theta = tl.load(theta_ptr)
    votes = tl.zeros((BLOCK_E,), tl.int32)
    for begin in range(0, tile_tokens, BLOCK_T):
        r = begin + tl.arange(0, BLOCK_T)
        real = (r < tile_tokens) & (tile * tile_tokens + r < num_tokens)
        token = tl.load(order_ptr + tile * tile_tokens + r, mask=real, other=0).to(
            tl.int64
        )
        at = scores_ptr + token[:, None] * num_experts + e[None, :]
        inside = real[:, None] & (e < num_experts)[None, :]
        score = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
        votes += tl.sum((score > theta).to(tl.int32), axis=0)
    tl.store(votes_ptr + tile * num_experts + e, votes, mask=e < num_experts)


@jit
def _invert_kernel(
    ids_ptr,
    offsets_ptr,
    pair_tile_ptr,
    pair_slot_ptr,
    num_tiles,
    chosen,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program g: the tiles that chose unit g, and the slot at which each has it."""
    unit = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)[None, :]
    at = tl.load(offsets_ptr + unit)
    for begin in range(0, num_tiles, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        inside = (n < num_tiles)[:, None] & (k < chosen)
        ids = tl.load(ids_ptr + n[:, None] * chosen + k, mask=inside, other=2147483647)
        has = tl.sum((ids == unit).to(tl.int32), axis=1)
        slot = tl.sum((ids < unit).to(tl.int32), axis=1)
        pair = at + tl.cumsum(has, axis=0) - 1
        tl.store(pair_tile_ptr + pair, n, mask=has != 0)
        tl.store(pair_slot_ptr + pair, slot, mask=has != 0)
        at += tl.sum(has, axis=0)


# --- kernels: products ---------------------------------------------------------------------------


@jit
def _hidden_kernel(
    x_ptr,
    w_ptr,
    h_ptr,
    out_ptr,
    order_ptr,
    ids_ptr,
    scores_ptr,
    theta_ptr,
    num_tokens,
    d_model,
    width,
    unit_size,
    chosen,
    expert_size,
    num_experts,
    SQUARE: tl.constexpr,
    BACKWARD: tl.constexpr,
    OWN: tl.constexpr,
    EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """BLOCK_W columns of a tile's act(x @ w[rows].T), or of its (x @ w[rows].T) * act' if `BACKWARD`.

    Programs of one tile follow each other, so that its rows of x are fetched from memory once.
    `EVEN` says that D and W are whole blocks: then no load is masked. Rows past the last token are
    computed from token 0 and stored as zeros.
    """
    columns = tl.cdiv(width, BLOCK_W)
    tile = tl.program_id(0) // columns
    first = (tl.program_id(0) % columns) * BLOCK_W
    r = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    token = tl.load(order_ptr + r, mask=r < num_tokens, other=0).to(tl.int64)
    j = first + tl.arange(0, BLOCK_W)
    unit = tl.load(ids_ptr + tile * chosen + j // unit_size, mask=j < width, other=0)
    row = unit * unit_size + j % unit_size
    x_rows = x_ptr + token[:, None] * d_model
    w_rows = w_ptr + row.to(tl.int64)[:, None] * d_model
    acc = tl.zeros((BLOCK_T, BLOCK_W), tl.float32)
    if OWN:
        # Which of the experts of these columns are the token's own, spread over their columns by a
        # product.
        per_unit = unit_size // expert_size
        slot = first // expert_size + tl.arange(0, BLOCK_E)
        here = slot * expert_size < width
        unit_e = tl.load(ids_ptr + tile * chosen + slot // per_unit, mask=here, other=0)
        expert = unit_e * per_unit + slot % per_unit
        score = tl.load(scores_ptr + token[:, None] * num_experts + expert[None, :])
        away = tl.where(score.to(tl.float32) > tl.load(theta_ptr), 0.0, -30000.0)
        spread = tl.where((j // expert_size)[None, :] == slot[:, None], 1.0, 0.0)
        if not WIDEN:
            away = away.to(x_ptr.dtype.element_ty)
            spread = spread.to(x_ptr.dtype.element_ty)
        acc = tl.dot(away, spread, acc, input_precision="ieee")
    for begin in range(0, d_model, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)[None, :]
        if EVEN:
            x = tl.load(x_rows + d)
            w = tl.load(w_rows + d)
        else:
            x = tl.load(x_rows + d, mask=d < d_model, other=0.0)
            w = tl.load(w_rows + d, mask=d < d_model, other=0.0)
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    at = r.to(tl.int64)[:, None] * width + j[None, :]
    if BACKWARD:
        if EVEN:
            h = tl.load(h_ptr + at).to(tl.float32)
        else:
            h = tl.load(h_ptr + at, mask=(j < width)[None, :], other=0.0).to(tl.float32)
        if SQUARE:
            acc *= 2.0 * tl.sqrt(h)
        else:
            acc = tl.where(h <= 0.0, 0.0, acc)
    else:
        acc = activate(acc, SQUARE)
        acc = tl.where((r < num_tokens)[:, None], acc, 0.0)
    if EVEN:
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty))
    else:
        tl.store(
            out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(j < width)[None, :]
        )


@jit
def _output_kernel(
    h_ptr,
    w_ptr,
    y_ptr,
    order_ptr,
    ids_ptr,
    num_tokens,
    d_model,
    width,
    unit_size,
    chosen,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D columns of one tile's h @ w[rows], written to the rows of the tile's tokens.

    `WHOLE` says that a unit is a whole number of steps of the sum: then one number tells a step's
    rows. `EVEN` says that D and W are whole blocks.
    """
    columns = tl.cdiv(d_model, BLOCK_D)
    tile = tl.program_id(0) // columns
    d = (tl.program_id(0) % columns) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    h_rows = h_ptr + r.to(tl.int64)[:, None] * width
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for begin in range(0, width, BLOCK_W):
        j = begin + tl.arange(0, BLOCK_W)
        if WHOLE:
            unit = tl.load(ids_ptr + tile * chosen + begin // unit_size)
            row = unit * unit_size + begin % unit_size + tl.arange(0, BLOCK_W)
        else:
            unit = tl.load(
                ids_ptr + tile * chosen + j // unit_size, mask=j < width, other=0
            )
            row = unit * unit_size + j % unit_size
        w_at = w_ptr + row.to(tl.int64)[:, None] * d_model + d[None, :]
        if EVEN:
            h = tl.load(h_rows + j[None, :])
            w = tl.load(w_at)
        else:
            h = tl.load(h_rows + j[None, :], mask=(j < width)[None, :], other=0.0)
            w = tl.load(w_at, mask=(d < d_model)[None, :], other=0.0)
        if WIDEN:
            h, w = h.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(h, w, acc, input_precision=PRECISION)
    token = tl.load(order_ptr + r, mask=r < num_tokens, other=0).to(tl.int64)
    at = y_ptr + token[:, None] * d_model + d[None, :]
    inside = (r < num_tokens)[:, None] & (d < d_model)[None, :]
    tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _weights_kernel(
    h_ptr,
    x_ptr,
    out_ptr,
    order_ptr,
    offsets_ptr,
    pair_tile_ptr,
    pair_slot_ptr,
    num_tokens,
    d_model,
    width,
    unit_size,
    num_units,
    splits,
    EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D columns of a unit's rows: h_b (x) x_b summed over a part of the unit's tiles.

    A unit whose size is no power of two is taken as two blocks, BLOCK_U and BLOCK_V neurons, which
    share each block of x (96 = 64 + 32). `EVEN` says that no neuron lies beyond them and no column
    beyond D.
    """
    columns = tl.cdiv(d_model, BLOCK_D)
    program = tl.program_id(0)
    d = (program % columns) * BLOCK_D + tl.arange(0, BLOCK_D)
    # Units vary faster than parts, so that programs in flight share tiles.
    part_unit = program // columns
    unit = part_unit % num_units
    start = tl.load(offsets_ptr + unit)
    end = tl.load(offsets_ptr + unit + 1)
    length = tl.cdiv(end - start, splits)
    first = start + (part_unit // num_units) * length
    last = tl.minimum(first + length, end)
    u = tl.arange(0, BLOCK_U)
    # Transposed, so that the side of 64 rows or more that tensor cores want is never the unit's.
    acc = tl.zeros((BLOCK_D, BLOCK_U), tl.float32)
    if BLOCK_V:
        v = BLOCK_U + tl.arange(0, BLOCK_V)
        acc_v = tl.zeros((BLOCK_D, BLOCK_V), tl.float32)
    STEPS: tl.constexpr = TILE // BLOCK_T
    for i in range(first * STEPS, last * STEPS):
        tile = tl.load(pair_tile_ptr + i // STEPS)
        slot = tl.load(pair_slot_ptr + i // STEPS)
        r = tile * TILE + (i % STEPS) * BLOCK_T + tl.arange(0, BLOCK_T)
        token = tl.load(order_ptr + r, mask=r < num_tokens, other=0).to(tl.int64)
        x_at = x_ptr + token[:, None] * d_model + d[None, :]
        h_rows = h_ptr + r.to(tl.int64)[:, None] * width + slot * unit_size
        if EVEN:
            x = tl.load(x_at)
            h = tl.load(h_rows + u[None, :])
        else:
            x = tl.load(x_at, mask=(d < d_model)[None, :], other=0.0)
            h = tl.load(h_rows + u[None, :], mask=(u < unit_size)[None, :], other=0.0)
        if WIDEN:
            x, h = x.to(tl.float32), h.to(tl.float32)
        acc = tl.dot(tl.trans(x), h, acc, input_precision=PRECISION)
        if BLOCK_V:
            if EVEN:
                h_v = tl.load(h_rows + v[None, :])
            else:
                h_v = tl.load(
                    h_rows + v[None, :], mask=(v < unit_size)[None, :], other=0.0
                )
            if WIDEN:
                h_v = h_v.to(tl.float32)
            acc_v = tl.dot(tl.trans(x), h_v, acc_v, input_precision=PRECISION)
    out_rows = out_ptr + part_unit.to(tl.int64) * unit_size * d_model
    in_d = (d < d_model)[None, :]
    at = out_rows + u[:, None] * d_model + d[None, :]
    tl.store(
        at,
        tl.trans(acc).to(out_ptr.dtype.element_ty),
        mask=in_d & (u < unit_size)[:, None],
    )
    if BLOCK_V:
        at = out_rows + v[:, None] * d_model + d[None, :]
        out = tl.trans(acc_v).to(out_ptr.dtype.element_ty)
        tl.store(at, out, mask=in_d & (v < unit_size)[:, None])


# --- sizes ---------------------------------------------------------------------------------------


def hidden_blocks(itemsize: int, backward: bool) -> dict[str, int]:
    """Block sizes of `_hidden_kernel`; BLOCK_D is the sum's step."""
    if itemsize == 2:
        wide = 128 if backward else 256
        return {"BLOCK_W": wide, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_W": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 3}


def output_blocks(itemsize: int, d_model: int) -> dict[str, int]:
    """Block sizes of `_output_kernel`; BLOCK_W is the sum's step."""
    if itemsize == 2:
        wide = 256 if d_model % 256 == 0 else 128
        return {"BLOCK_D": wide, "BLOCK_W": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_D": 64, "BLOCK_W": 32, "num_warps": 8, "num_stages": 3}


def unit_blocks(unit_size: int) -> tuple[int, int]:
    """BLOCK_U and BLOCK_V for a unit: 64 and 0, or for 96 neurons 64 and 32."""
    block = next_power_of_2(max(16, unit_size))
    if block >= 32 and block // 2 < unit_size <= block * 3 // 4:
        return block // 2, max(16, block // 4)
    return block, 0


def weights_blocks(itemsize: int, unit_size: int, d_model: int) -> dict[str, int]:
    """Block sizes of `_weights_kernel`; BLOCK_T is the sum's step."""
    block_u, block_v = unit_blocks(unit_size)
    if itemsize == 2:
        wide = 256 if d_model % 256 == 0 and block_u + block_v <= 128 else 128
        sizes = {"BLOCK_D": wide, "BLOCK_T": 64, "num_warps": 8, "num_stages": 3}
    else:
        sizes = {"BLOCK_D": 64, "BLOCK_T": 32, "num_warps": 8, "num_stages": 1}
    return {"BLOCK_U": block_u, "BLOCK_V": block_v, **sizes}


def weights_splits(programs: int, pairs_per_unit: int) -> int:
    """Parts that each unit's sum over tiles is cut into, for programs enough."""
    return max(
        1, min(cdiv(ENOUGH_PROGRAMS, programs), pairs_per_unit // LEAST_PAIRS_PER_SPLIT)
    )


def _precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: three TF32 products carry float32's precision on tensor cores."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


# --- launchers -----------------------------------------------------------------------------------


def tile_plan(
    scores_TE: Tensor, theta_1: Tensor, units: int, chosen: int, tile: int
) -> TilePlan:
    """Sort tokens by the unit that suits them best, cut them into tiles, let each tile choose.

    A token votes for its own experts, those with scores above `theta_1`; a tile takes the `chosen`
    units with most votes, ties to the lower index. Nothing waits for the device.
    """
    tokens, experts = scores_TE.shape
    tiles = cdiv(tokens, tile)
    best_TG = scores_TE.float().view(tokens, units, -1).mean(2).to(scores_TE.dtype)
    order_T = route_top_k(best_TG, 1).pair_token_P
    votes_NE = torch.empty((tiles, experts), dtype=torch.int32, device=scores_TE.device)
    block_e = next_power_of_2(experts)
    _vote_kernel[(tiles,)](
        scores_TE,
        theta_1,
        order_T,
        votes_NE,
        tokens,
        experts,
        tile,
        BLOCK_T=min(next_power_of_2(tile), max(1, 8192 // block_e)),
        BLOCK_E=block_e,
        num_warps=8,
    )
    votes_NG = votes_NE.view(tiles, units, -1).sum(2).float()
    routed = route_top_k(votes_NG, chosen)
    pair_tile_P, pair_slot_P = (torch.empty_like(routed.pair_token_P) for _ in range(2))
    block_k = next_power_of_2(chosen)
    _invert_kernel[(units,)](
        routed.ids_TK,
        routed.offsets_E1,
        pair_tile_P,
        pair_slot_P,
        tiles,
        chosen,
        BLOCK_N=max(1, 4096 // block_k),
        BLOCK_K=block_k,
        num_warps=4,
    )
    return TilePlan(
        order_T,
        routed.ids_TK,
        routed.offsets_E1,
        pair_tile_P,
        pair_slot_P,
        scores_TE,
        theta_1,
    )


def hidden(
    x_TD: Tensor,
    w_FD: Tensor,
    plan: TilePlan,
    activation: str,
    tile: int,
    own: bool = False,
    h_RW: Tensor | None = None,
    blocks: dict[str, int] | None = None,
) -> Tensor:
    """act(x @ w[rows].T) of every tile, [R, W]; given h_RW, (x @ w[rows].T) * act' instead.

    Rows past the last token are zeros.
    """
    (tokens, d_model), neurons = x_TD.shape, w_FD.shape[0]
    tiles, chosen = plan.ids_NK.shape
    unit_size = neurons // (plan.offsets_G1.numel() - 1)
    experts = plan.scores_TE.shape[1]
    expert_size, width = neurons // experts, chosen * unit_size
    blocks = blocks or hidden_blocks(x_TD.element_size(), h_RW is not None)
    out_RW = x_TD.new_empty((tiles * tile, width))
    _hidden_kernel[(tiles * cdiv(width, blocks["BLOCK_W"]),)](
        x_TD,
        w_FD,
        out_RW if h_RW is None else h_RW,
        out_RW,
        plan.order_T,
        plan.ids_NK,
        plan.scores_TE,
        plan.theta_1,
        tokens,
        d_model,
        width,
        unit_size,
        chosen,
        expert_size,
        experts,
        SQUARE=activation == "relu2",
        BACKWARD=h_RW is not None,
        OWN=own and h_RW is None,
        EVEN=width % blocks["BLOCK_W"] == 0 and d_model % blocks["BLOCK_D"] == 0,
        WIDEN=INTERPRETED,
        PRECISION=_precision(x_TD.dtype),
        BLOCK_T=tile,
        BLOCK_E=max(16, next_power_of_2((blocks["BLOCK_W"] - 1) // expert_size + 2)),
        **blocks,
    )
    return out_RW


def output(
    h_RW: Tensor,
    w_FD: Tensor,
    plan: TilePlan,
    tokens: int,
    tile: int,
    blocks: dict[str, int] | None = None,
) -> Tensor:
    """h @ w[rows] of every tile, in the tokens' own order: [T, D]."""
    (neurons, d_model), width = w_FD.shape, h_RW.shape[1]
    tiles, chosen = plan.ids_NK.shape
    unit_size = neurons // (plan.offsets_G1.numel() - 1)
    blocks = blocks or output_blocks(h_RW.element_size(), d_model)
    y_TD = h_RW.new_empty((tokens, d_model))
    _output_kernel[(tiles * cdiv(d_model, blocks["BLOCK_D"]),)](
        h_RW,
        w_FD,
        y_TD,
        plan.order_T,
        plan.ids_NK,
        tokens,
        d_model,
        width,
        unit_size,
        chosen,
        WHOLE=unit_size % blocks["BLOCK_W"] == 0,
        EVEN=width % blocks["BLOCK_W"] == 0 and d_model % blocks["BLOCK_D"] == 0,
        WIDEN=INTERPRETED,
        PRECISION=_precision(h_RW.dtype),
        BLOCK_T=tile,
        **blocks,
    )
    return y_TD


def weights(
    h_RW: Tensor,
    x_TD: Tensor,
    plan: TilePlan,
    tile: int,
    blocks: dict[str, int] | None = None,
    splits: int | None = None,
) -> Tensor:
    """h_b (x) x_b summed for each unit over the tokens of the tiles that chose it: [F, D].

    A unit that no tile chose gets exact zeros.
    """
    (tokens, d_model), width = x_TD.shape, h_RW.shape[1]
    (tiles, chosen), units = plan.ids_NK.shape, plan.offsets_G1.numel() - 1
    unit_size = width // chosen
    blocks = blocks or weights_blocks(x_TD.element_size(), unit_size, d_model)
    programs = units * cdiv(d_model, blocks["BLOCK_D"])
    splits = splits or weights_splits(programs, tiles * chosen // units)
    out_CFD = torch.empty(
        (splits, units * unit_size, d_model),
        dtype=x_TD.dtype if splits == 1 else torch.float32,
        device=x_TD.device,
    )
    whole_unit = unit_size == blocks["BLOCK_U"] + blocks["BLOCK_V"]
    _weights_kernel[(programs * splits,)](
        h_RW,
        x_TD,
        out_CFD,
        plan.order_T,
        plan.offsets_G1,
        plan.pair_tile_P,
        plan.pair_slot_P,
        tokens,
        d_model,
        width,
        unit_size,
        units,
        splits,
        EVEN=whole_unit and d_model % blocks["BLOCK_D"] == 0,
        WIDEN=INTERPRETED,
        PRECISION=_precision(x_TD.dtype),
        TILE=tile,
        **{**blocks, "BLOCK_T": min(tile, blocks["BLOCK_T"])},
    )
    return out_CFD[0] if splits == 1 else out_CFD.sum(0).to(x_TD.dtype)


# --- operators -----------------------------------------------------------------------------------

_PLAN = (
    "Tensor order_T, Tensor ids_NK, Tensor offsets_G1, Tensor pair_tile_P, Tensor pair_slot_P,"
    " Tensor scores_TE, Tensor theta_1"
)


@torch.library.custom_op(
    "ambidex::tile_plan",
    mutates_args=(),
    schema="(Tensor scores_TE, Tensor theta_1, int units, int chosen, int tile)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _plan(
    scores_TE: Tensor, theta_1: Tensor, units: int, chosen: int, tile: int
) -> tuple[Tensor, ...]:
    return tuple(tile_plan(scores_TE, theta_1, units, chosen, tile)[:5])


@_plan.register_fake
def _plan_shapes(
    scores_TE: Tensor, theta_1: Tensor, units: int, chosen: int, tile: int
) -> tuple[Tensor, ...]:
    tokens = scores_TE.shape[0]
    tiles = cdiv(tokens, tile)
    pairs = tiles * chosen
    shapes: tuple[tuple[int, ...], ...] = (
        (tokens,),
        (tiles, chosen),
        (units + 1,),
        (pairs,),
        (pairs,),
    )
    return tuple(scores_TE.new_empty(shape, dtype=torch.int32) for shape in shapes)


@torch.library.custom_op(
    "ambidex::tile_ffn",
    mutates_args=(),
    schema=f"(Tensor x_TD, Tensor up_FD, Tensor down_FD, {_PLAN}, str activation, int tile,"
    " bool own) -> (Tensor, Tensor)",
)
def _forward(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    order_T: Tensor,
    ids_NK: Tensor,
    offsets_G1: Tensor,
    pair_tile_P: Tensor,
    pair_slot_P: Tensor,
    scores_TE: Tensor,
    theta_1: Tensor,
    activation: str,
    tile: int,
    own: bool,
) -> tuple[Tensor, Tensor]:
    """y [T, D] and, for the backward pass, h [R, W]."""
    plan = TilePlan(
        order_T, ids_NK, offsets_G1, pair_tile_P, pair_slot_P, scores_TE, theta_1
    )
    h_RW = hidden(x_TD, up_FD, plan, activation, tile, own)
    return output(h_RW, down_FD, plan, x_TD.shape[0], tile), h_RW


@_forward.register_fake
def _forward_shapes(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    order_T: Tensor,
    ids_NK: Tensor,
    offsets_G1: Tensor,
    pair_tile_P: Tensor,
    pair_slot_P: Tensor,
    scores_TE: Tensor,
    theta_1: Tensor,
    activation: str,
    tile: int,
    own: bool,
) -> tuple[Tensor, Tensor]:
    tiles, chosen = ids_NK.shape
    width = chosen * (up_FD.shape[0] // (offsets_G1.shape[0] - 1))
    return torch.empty_like(x_TD), x_TD.new_empty((tiles * tile, width))


@torch.library.custom_op(
    "ambidex::tile_ffn_backward",
    mutates_args=(),
    schema="(Tensor dy_TD, Tensor x_TD, Tensor up_FD, Tensor down_FD, Tensor h_RW,"
    f" {_PLAN}, str activation, int tile) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    h_RW: Tensor,
    order_T: Tensor,
    ids_NK: Tensor,
    offsets_G1: Tensor,
    pair_tile_P: Tensor,
    pair_slot_P: Tensor,
    scores_TE: Tensor,
    theta_1: Tensor,
    activation: str,
    tile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x [T, D], up and down [F, D]."""
    plan = TilePlan(
        order_T, ids_NK, offsets_G1, pair_tile_P, pair_slot_P, scores_TE, theta_1
    )
    dy_TD = dy_TD.contiguous()
    g_RW = hidden(dy_TD, down_FD, plan, activation, tile, h_RW=h_RW)
    return (
        output(g_RW, up_FD, plan, x_TD.shape[0], tile),
        weights(g_RW, x_TD, plan, tile),
        weights(h_RW, dy_TD, plan, tile),
    )


@_backward.register_fake
def _backward_shapes(
    dy_TD: Tensor,
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    h_RW: Tensor,
    order_T: Tensor,
    ids_NK: Tensor,
    offsets_G1: Tensor,
    pair_tile_P: Tensor,
    pair_slot_P: Tensor,
    scores_TE: Tensor,
    theta_1: Tensor,
    activation: str,
    tile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x_TD), torch.empty_like(up_FD), torch.empty_like(down_FD)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_TD, up_FD, down_FD, *plan, ctx.activation, ctx.tile, _ = inputs
    ctx.save_for_backward(x_TD, up_FD, down_FD, output[1], *plan)
    # h leaves this file for nobody: its gradient is no tensor of zeros, but absent.
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy_TD: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    gradients = _backward(dy_TD, *ctx.saved_tensors, ctx.activation, ctx.tile)
    return *gradients, *(None,) * 10


_forward.register_autograd(_gradients, setup_context=_save)


def plan_tiles(
    scores_TE: Tensor, theta_1: Tensor, units: int, chosen: int, tile: int
) -> TilePlan:
    """`tile_plan`, such that torch.compile takes it whole; no gradients."""
    return TilePlan(*_plan(scores_TE, theta_1, units, chosen, tile), scores_TE, theta_1)


def tile_ffn(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    plan: TilePlan,
    activation: str,
    tile: int = 128,
    own: bool = False,
) -> Tensor:
    """y [T, D] of what the tiles chose; differentiable, once, in x, up and down.

    Args:
        x_TD: [T, D], float32, bfloat16 or float16; T >= 1.
        up_FD, down_FD: [F, D], dtype of x; unit g owns rows g*U .. (g+1)*U.
        plan: from `plan_tiles`, for the same tokens and tile.
        activation: "relu" or "relu2".
        tile: B, a power of two from 16 up.
        own: whether a token uses only its own experts among its tile's.
    """
    y_TD, _ = _forward(x_TD, up_FD, down_FD, *plan, activation, tile, own)
    return y_TD
