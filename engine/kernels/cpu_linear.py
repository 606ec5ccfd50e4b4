"""Linear layers on the CPU with weights packed once.

An eager ``F.linear`` reads its weight in the order it was stored, not the order that suits the
processor: on two Zen 3 cores it moves half the bytes a second of a packed weight, and bfloat16
without hardware support is up to seven times slower than float32 beyond one token. So every matrix
is packed at load time, in the best form this processor has:

``onednn``  an opaque oneDNN weight: float32 everywhere, bfloat16 where the processor multiplies it
            (AVX512-BF16, AMX, AVX-NE-CONVERT). Holds one copy of the weight, in its own type.
``widen``   bfloat16 on any other processor. Holds one bfloat16 copy as blocks of columns. Few
            tokens sum weight rows directly (an embedding bag reads bfloat16 and adds in float32);
            many tokens widen a few blocks at a time into a cached scratch and multiply in float32.
``plain``   builds of torch without oneDNN: ``F.linear``.

Legend: T tokens, K inputs, N outputs, B blocks of columns, S columns per block.
"""

from __future__ import annotations

import functools
import threading
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Path = Literal["onednn", "widen", "plain"]

# Beyond this many tokens, widening the weight costs less than walking its rows once per token.
ROWS_MAX_TOKENS = 12
_SCRATCH_ELEMENTS = 1 << 20
_BLOCK_COLUMNS = 128
# oneDNN lays weights out for an expected batch. The layout for 16 tokens is as fast at one token as
# the layout for one, and 15-30% faster from four tokens on.
_PACK_BATCH = 16
_local = threading.local()


@functools.cache
def best_path(dtype: torch.dtype) -> Path:
    """The packed form this processor runs fastest for weights of ``dtype``.

    Raises ValueError for types other than float32 and bfloat16.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"CPU weights must be float32 or bfloat16, not {dtype}")
    native = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    if dtype == torch.float32:
        return "onednn" if native else "plain"
    supported = native and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "onednn" if supported else "widen"


def row_sums(table_RS: Tensor, rows_BK: Tensor, factors_BK: Tensor) -> Tensor:
    """``out[b] = sum_k factors[b, k] * table[rows[b, k]]``: B products of a vector and chosen rows.

    The rows are read where they lie, once per use, and added in float32. Bags run in parallel, and
    bags that follow each other and share rows share the cache.
    """
    B, K = rows_BK.shape
    out: Tensor = torch.embedding_bag(
        table_RS, rows_BK.reshape(-1), _bag_starts(B, K), False, 0, False, factors_BK.reshape(-1)
    )[0]
    return out


@functools.lru_cache(maxsize=64)
def _all_starts(width: int) -> Tensor:
    with torch.inference_mode(False):  # cached, so usable in any mode afterwards
        return torch.arange(0, 4096 * width, width, dtype=torch.int32)


def _bag_starts(bags: int, width: int) -> Tensor:
    if bags <= 4096:
        return _all_starts(width)[:bags]
    return torch.arange(0, bags * width, width, dtype=torch.int32)


@functools.lru_cache(maxsize=64)
def block_rows(blocks: int, width: int) -> Tensor:
    """[blocks, width] int32: the rows of each block in a table of blocks * width rows."""
    with torch.inference_mode(False):
        return torch.arange(blocks * width, dtype=torch.int32).view(blocks, width)


def scratch(rows: int, columns: int) -> Tensor:
    """A float32 [rows, columns] work area of this thread, overwritten by its next call."""
    held: Tensor | None = getattr(_local, "scratch", None)
    if held is None or held.numel() < rows * columns:
        with torch.inference_mode(False):
            held = torch.empty(max(rows * columns, _SCRATCH_ELEMENTS))
        _local.scratch = held
    return held[: rows * columns].view(rows, columns)


def widened_columns(x_TK: Tensor, table_BKS: Tensor) -> Tensor:
    """x @ [block 0 | block 1 | ...] in float32, widening a few blocks at a time: [T, B * S]."""
    B, K, S = table_BKS.shape
    x32_TK = x_TK.float()
    y_TN = torch.empty(x_TK.shape[0], B * S)
    group = max(1, _SCRATCH_ELEMENTS // (K * S))
    for b in range(0, B, group):
        part_BKS = table_BKS[b : b + group]
        n = part_BKS.shape[0]
        wide_KN = scratch(K, n * S)
        wide_KN.view(K, n, S).copy_(part_BKS.transpose(0, 1))
        torch.mm(x32_TK, wide_KN, out=y_TN[:, b * S : (b + n) * S])
    return y_TN


def widened_rows(h_TK: Tensor, table_KN: Tensor) -> Tensor:
    """h @ table in float32, widening a few rows of the table at a time: [T, N]."""
    K, N = table_KN.shape
    h32_TK = h_TK.float()
    y_TN = torch.zeros(h_TK.shape[0], N)
    group = max(1, _SCRATCH_ELEMENTS // N)
    for k in range(0, K, group):
        wide_KN = scratch(min(group, K - k), N).copy_(table_KN[k : k + group])
        y_TN.addmm_(h32_TK[:, k : k + group], wide_KN)
    return y_TN


def all_blocks(x_TK: Tensor, table_BKS: Tensor) -> Tensor:
    """x @ [block 0 | block 1 | ...] by row sums, for few tokens: [T, B * S]."""
    B, K, S = table_BKS.shape
    T = x_TK.shape[0]
    rows_BTK = block_rows(B, K).unsqueeze(1).expand(B, T, K)
    y_BTS = row_sums(
        table_BKS.view(B * K, S), rows_BTK.reshape(B * T, K), x_TK.expand(B, T, K).reshape(-1, K)
    ).view(B, T, S)
    return y_BTS.transpose(0, 1).reshape(T, B * S)


class PackedLinear:
    """``y = x @ weight.T``, optionally with ReLU, from a weight packed once.

    Args:
        weight_NK: [outputs, inputs], float32 or bfloat16, on the CPU. It is copied into the packed
            form; the caller may free it.

    Raises:
        ValueError: the weight is not a float32 or bfloat16 matrix on the CPU.
    """

    def __init__(self, weight_NK: Tensor) -> None:
        if weight_NK.dim() != 2 or weight_NK.device.type != "cpu":
            raise ValueError("weight must be a matrix [outputs, inputs] on the CPU")
        self.path = best_path(weight_NK.dtype)
        self.dtype = weight_NK.dtype
        self.out_features, self.in_features = weight_NK.shape
        self._weight = self._pack(weight_NK.detach().contiguous())

    def _pack(self, weight_NK: Tensor) -> Tensor:
        if self.path == "onednn":
            packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK, _PACK_BATCH)
            return packed
        return column_blocks(weight_NK) if self.path == "widen" else weight_NK.clone()

    @property
    def nbytes(self) -> int:
        """Bytes of weights held (the padding inside a oneDNN weight is not counted)."""
        N = self._weight.shape[0] * self._weight.shape[2] if self.path == "widen" else 0
        return (N or self.out_features) * self.in_features * self.dtype.itemsize

    def __call__(self, x_TK: Tensor, relu: bool = False) -> Tensor:
        """[..., inputs] of the weight's type -> [..., outputs] of the same type."""
        if x_TK.numel() == 0:
            return x_TK.new_zeros(*x_TK.shape[:-1], self.out_features)
        if self.path == "onednn":
            y: Tensor = torch.ops.mkldnn._linear_pointwise(
                x_TK, self._weight, None, "relu" if relu else "none", [], ""
            )
            return y
        if self.path == "plain":
            y = F.linear(x_TK, self._weight)
        else:
            y = self._widened(x_TK.reshape(-1, self.in_features))
            y = y.view(*x_TK.shape[:-1], self.out_features)
        return y.relu_() if relu else y

    def _widened(self, x_TK: Tensor) -> Tensor:
        few = x_TK.shape[0] <= ROWS_MAX_TOKENS
        y = (all_blocks if few else widened_columns)(x_TK, self._weight)
        return y[:, : self.out_features].to(x_TK.dtype).contiguous()


def column_blocks(weight_NK: Tensor) -> Tensor:
    """[N, K] -> [B, K, S]: the transpose in blocks of columns, the last padded with zeros."""
    N, K = weight_NK.shape
    S = min(_BLOCK_COLUMNS, N)
    B = -(-N // S)
    padded_NK = F.pad(weight_NK, (0, 0, 0, B * S - N))
    return padded_NK.view(B, S, K).transpose(1, 2).contiguous()
