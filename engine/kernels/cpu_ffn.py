"""The expert FFN on the CPU: dense, or only the chosen experts, from weights packed once.

An expert is a slice of S neurons: rows e*S .. (e+1)*S of ``up`` and ``down``. Four ways compute the
same sums, and a cost rule picks one per call:

``rows``     Both products as weighted sums of weight rows (an embedding bag). One operator per
             product whatever the number of experts, every chosen row read where it lies, nothing
             else touched; pairs are sorted by expert, so tokens that share one share the cache.
             The way for few tokens; over all experts it is also the best dense way for few tokens
             on some processors, and dense() uses it there.
``grouped``  Tokens gathered by expert, two matrix products per expert, one combining sum. For many
             tokens.
``masked``   The dense products with unchosen activations set to zero. For when nearly all pairs are
             chosen anyway, so that sparse never costs materially more than dense.
``gemm``     The dense products themselves.

Memory: ``up`` as [E, D, S] and ``down`` as [F, D], one copy of the weights, which is all that the
``widen`` path (bfloat16 without hardware support) needs for both modes. On the ``onednn`` and
``plain`` paths dense products hold a second, packed copy of each matrix.

Legend: T tokens, D model, F neurons, E experts, S neurons per expert, P token-expert pairs,
U experts in use (the union over tokens).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.kernels.cpu_linear import (
    PackedLinear,
    best_path,
    block_rows,
    row_sums,
    scratch,
    widened_columns,
    widened_rows,
)

ACTIVATIONS = ("relu", "relu2")


@dataclass(frozen=True)
class Rates:
    """What one path's operators cost; the unit of time is the microsecond.

    Fitted to measurements with two and four threads on Zen 3 (AVX2) and Xeon (AVX2, AVX512, AMX).
    The rule compares ways on one host, so only ratios matter, and those vary less than the rates.
    """

    gemm: float  # flop per microsecond and thread, dense products
    rows: float
    grouped: float
    gemm_bytes: float  # weight bytes per microsecond, all threads
    rows_bytes: float
    grouped_bytes: float
    per_group: float  # two products on few rows: mostly waking threads and choosing a kernel


_FLOAT32 = Rates(75e3, 29e3, 65e3, 24e3, 25e3, 18e3, 80.0)
_BFLOAT16 = Rates(380e3, 30e3, 200e3, 22e3, 40e3, 15e3, 50.0)
_WIDENED = Rates(60e3, 29e3, 45e3, 5e3, 25e3, 5e3, 80.0)
_GEMM_OVERHEAD = 20.0
_MASK_OVERHEAD = 20.0
_ROWS_OVERHEAD = 80.0
_ROWS_PER_PAIR = 0.25
_GROUPED_OVERHEAD = 70.0
# Sparse ways must promise at least this gain over the masked dense products to be chosen.
_SURE_GAIN = 0.95
# Below this many pairs per expert, groups never pay, and counting the experts in use is saved.
_GROUPED_MIN_ROWS = 8
# Row sums need one index and one factor per row and pair. Many pairs go in slices of this many, so
# that these stay in the cache and in memory that the allocator does not give back every time.
_SLICE_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class CostRule:
    """Predicts what each way costs for one layer shape, in microseconds, and picks the cheapest."""

    model: int
    experts: int
    expert_size: int
    itemsize: int
    threads: int
    rates: Rates

    @property
    def _flops(self) -> int:
        """Of one pair."""
        return 4 * self.model * self.expert_size

    @property
    def _bytes(self) -> int:
        """Of one expert."""
        return 2 * self.model * self.expert_size * self.itemsize

    def rows(self, P: int, U: int) -> float:
        """Read U experts once, then add P of them row by row."""
        adding = P * (_ROWS_PER_PAIR + self._flops / self.rates.rows) / self.threads
        return _ROWS_OVERHEAD + U * self._bytes / self.rates.rows_bytes + adding

    def grouped(self, P: int, U: int) -> float:
        """Two products for each of U experts, P rows in all."""
        if P / self.experts < _GROUPED_MIN_ROWS:
            return float("inf")
        reading = U * (self.rates.per_group + self._bytes / self.rates.grouped_bytes)
        return _GROUPED_OVERHEAD + reading + P * self._flops / self.rates.grouped / self.threads

    def gemm(self, T: int) -> float:
        """All experts' bytes once, all flops of T tokens."""
        reading = self.experts * self._bytes / self.rates.gemm_bytes
        adding = T * self.experts * self._flops / self.rates.gemm / self.threads
        return _GEMM_OVERHEAD + reading + adding


@functools.lru_cache(maxsize=4096)
def dense_way(rule: CostRule, T: int) -> str:
    """The cheaper of rows and gemm for all neurons of T tokens."""
    return "rows" if rule.rows(T * rule.experts, rule.experts) < rule.gemm(T) else "gemm"


@functools.lru_cache(maxsize=4096)
def sparse_way(rule: CostRule, T: int, P: int, U: int) -> str:
    """The cheapest of rows, grouped, masked for T tokens, P pairs and U experts in use."""
    rows, grouped = rule.rows(P, U), rule.grouped(P, U)
    masked = rule.gemm(T) + _MASK_OVERHEAD + 0.002 * T * rule.experts
    if min(rows, grouped) > _SURE_GAIN * masked:
        return "rows" if dense_way(rule, T) == "rows" else "masked"
    return "rows" if rows <= grouped else "grouped"


class PackedExpertFFN:
    """``relu(x @ up.T) @ down``, over all neurons or over each token's chosen experts.

    Args:
        up_FD, down_FD: weights, neuron by neuron; float32 or bfloat16, on the CPU. Both are copied
            into packed forms; the caller may free them.
        num_experts: E; must divide F.
        activation: "relu", or "relu2" for its square.

    Raises:
        ValueError: shapes, types or names outside the above.
    """

    def __init__(
        self, up_FD: Tensor, down_FD: Tensor, num_experts: int, activation: str = "relu"
    ) -> None:
        _check(up_FD, down_FD, num_experts, activation)
        F, D = up_FD.shape
        E = num_experts
        self.num_experts, self.activation, self.dtype = E, activation, up_FD.dtype
        self._shape = (D, F, E, F // E)
        self.path = best_path(up_FD.dtype)
        rates, threads = _rates(self.path, self.dtype), torch.get_num_threads()
        self._rule = CostRule(D, E, F // E, self.dtype.itemsize, threads, rates)
        up_EDS = up_FD.detach().view(E, F // E, D).transpose(1, 2)
        self._up_EDS = up_EDS.clone(memory_format=torch.contiguous_format)
        self._down_FD = down_FD.detach().clone(memory_format=torch.contiguous_format)
        self._ups = self._up_EDS.unbind(0)
        self._downs = self._down_FD.view(E, F // E, D).unbind(0)
        self._dense: tuple[PackedLinear, PackedLinear] | None = None
        if self.path != "widen":
            self._dense = (PackedLinear(up_FD), PackedLinear(down_FD.t()))

    @property
    def nbytes(self) -> int:
        """Bytes of weights held, packed copies included."""
        own = self._up_EDS.nbytes + self._down_FD.nbytes
        return own + sum(linear.nbytes for linear in self._dense or ())

    def dense(self, x_TD: Tensor) -> Tensor:
        """All neurons: [T, D] -> [T, D], in the weights' type."""
        T, E = x_TD.shape[0], self.num_experts
        if T == 0:
            return torch.zeros_like(x_TD)
        if self.dense_way(T) == "rows":
            return self._rows(x_TD, *_every_pair(T, E))
        return self._gemm(x_TD, None)

    def sparse(self, x_TD: Tensor, chosen_TE: Tensor) -> Tensor:
        """Each token's chosen experts only: [T, D], bool [T, E] -> [T, D], in the weights' type.

        Any number of experts per token, none included (that token's output is zero). With all
        experts chosen the result is ``dense(x)`` up to rounding.
        """
        T = x_TD.shape[0]
        if T == 1:
            return self.sparse_one(x_TD, chosen_TE[0].nonzero().view(-1))
        expert_P, token_P = chosen_TE.t().nonzero().unbind(1)
        P = expert_P.shape[0]
        if P == 0:
            return torch.zeros_like(x_TD)
        way = self.sparse_way(T, P, self._in_use(P, chosen_TE))
        if way == "rows":
            return self._rows(x_TD, expert_P, token_P)
        if way == "grouped":
            return self._grouped(x_TD, token_P, chosen_TE.sum(0).tolist())
        return self._gemm(x_TD, chosen_TE)

    def _in_use(self, P: int, chosen_TE: Tensor) -> int:
        """U; for few pairs its upper bound, which decides alike and saves two operators."""
        if P / self.num_experts < _GROUPED_MIN_ROWS:
            return min(P, self.num_experts)
        return int(chosen_TE.any(0).sum())

    def sparse_one(self, x_1D: Tensor, expert_P: Tensor) -> Tensor:
        """One token and its experts: [1, D], int64 [P] -> [1, D], in as few operators as possible.

        Groups of one row never pay, so there is nothing to group.
        """
        P = expert_P.shape[0]
        if P == 0:
            return torch.zeros_like(x_1D)
        if self.sparse_way(1, P, P) == "masked":
            chosen_1E = torch.zeros(1, self.num_experts, dtype=torch.bool)
            return self._gemm(x_1D, chosen_1E.index_fill_(1, expert_P, True))
        return self._rows(x_1D, expert_P, None)

    @property
    def rule(self) -> CostRule:
        """The cost rule for this layer at torch's present number of threads."""
        threads = torch.get_num_threads()
        if self._rule.threads != threads:
            self._rule = replace(self._rule, threads=threads)
        return self._rule

    def dense_way(self, T: int) -> str:
        """How dense() runs T tokens: by rows or by gemm."""
        return dense_way(self.rule, T)

    def sparse_way(self, T: int, P: int, U: int) -> str:
        """How sparse() runs P pairs of T tokens over U experts: by rows, grouped or masked."""
        return sparse_way(self.rule, T, P, U)

    # --- the ways ---

    def _rows(self, x_TD: Tensor, expert_P: Tensor, token_P: Tensor | None) -> Tensor:
        """`token_P` is None for a single token, which all pairs share."""
        if token_P is None:
            return self._rows_of_one(x_TD, expert_P)
        size = max(1, _SLICE_ELEMENTS // self._shape[0])
        slices = []
        for start in range(0, len(expert_P), size):
            part = slice(start, start + size)
            x_PD = x_TD.index_select(0, token_P[part])
            slices.append(self._row_pairs(x_PD, expert_P[part]))
        y_PD = slices[0] if len(slices) == 1 else torch.cat(slices)
        return _combine(y_PD, token_P, x_TD.shape[0])

    def _rows_of_one(self, x_1D: Tensor, expert_P: Tensor) -> Tensor:
        """A single token: its experts' rows of `down` are summed in one bag a thread."""
        D, _, E, S = self._shape
        P = len(expert_P)
        h_PS = self._hidden(x_1D.expand(P, D), expert_P)
        rows_PS = block_rows(E, S).index_select(0, expert_P)
        bags = self.rule.threads if P * S % self.rule.threads == 0 else P
        return row_sums(self._down_FD, rows_PS.view(bags, -1), h_PS.view(bags, -1)).sum(
            0, keepdim=True
        )

    def _row_pairs(self, x_PD: Tensor, expert_P: Tensor) -> Tensor:
        """The output of each pair by itself: [P, D]."""
        rows_PS = block_rows(*self._shape[2:]).index_select(0, expert_P)
        return row_sums(self._down_FD, rows_PS, self._hidden(x_PD, expert_P))

    def _hidden(self, x_PD: Tensor, expert_P: Tensor) -> Tensor:
        """The activations of each pair: [P, S]."""
        D, _, E, S = self._shape
        rows_PD = block_rows(E, D).index_select(0, expert_P)
        return self._activate(row_sums(self._up_EDS.view(E * D, S), rows_PD, x_PD))

    def _grouped(self, x_TD: Tensor, token_P: Tensor, counts: list[int]) -> Tensor:
        compute = torch.float32 if self.path == "widen" else x_TD.dtype
        x_PD = x_TD.index_select(0, token_P).to(compute)
        y_PD = torch.empty_like(x_PD)
        start = 0
        for e, count in enumerate(counts):
            if count:
                part = slice(start, start + count)
                h_PS = self._activate(torch.mm(x_PD[part], self._expert(self._ups[e])))
                torch.mm(h_PS, self._expert(self._downs[e]), out=y_PD[part])
                start += count
        return _combine(y_PD, token_P, x_TD.shape[0]).to(x_TD.dtype)

    def _expert(self, weight: Tensor) -> Tensor:
        return scratch(*weight.shape).copy_(weight) if self.path == "widen" else weight

    def _gemm(self, x_TD: Tensor, chosen_TE: Tensor | None) -> Tensor:
        T = x_TD.shape[0]
        if self._dense is None:
            h_TF = self._activate(widened_columns(x_TD, self._up_EDS))
        else:
            h_TF = self._dense[0](x_TD, relu=True)
            if self.activation == "relu2":
                h_TF.square_()
        if chosen_TE is not None:
            h_TF.view(T, self.num_experts, -1).mul_(chosen_TE.unsqueeze(-1))
        if self._dense is None:
            return widened_rows(h_TF, self._down_FD).to(x_TD.dtype)
        return self._dense[1](h_TF)

    def _activate(self, h: Tensor) -> Tensor:
        h.relu_()
        return h.square_() if self.activation == "relu2" else h


def expert_ffn_reference(
    x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, chosen_TE: Tensor, activation: str = "relu"
) -> Tensor:
    """The dense FFN with the activations of unchosen experts set to zero: right by inspection."""
    T, E = chosen_TE.shape
    h_TF = torch.relu(x_TD @ up_FD.t())
    if activation == "relu2":
        h_TF = h_TF.square()
    h_TES = h_TF.view(T, E, up_FD.shape[0] // E) * chosen_TE.unsqueeze(-1)
    return h_TES.flatten(1) @ down_FD


def _combine(y_PD: Tensor, token_P: Tensor, T: int) -> Tensor:
    """Sum the pairs of each token, in float32 whatever their type: [T, D]."""
    order_P = token_P.argsort(stable=True)
    count_T = token_P.bincount(minlength=T)
    y_TD: Tensor = torch.embedding_bag(y_PD, order_P, count_T.cumsum(0) - count_T)[0]
    return y_TD


@functools.lru_cache(maxsize=64)
def _every_pair(T: int, E: int) -> tuple[Tensor, Tensor | None]:
    with torch.inference_mode(False):  # cached, so usable in any mode afterwards
        experts = torch.arange(E).repeat_interleave(T)
        return experts, None if T == 1 else torch.arange(T).repeat(E)


def _rates(path: str, dtype: torch.dtype) -> Rates:
    if path == "widen":
        return _WIDENED
    return _FLOAT32 if dtype == torch.float32 else _BFLOAT16


def _check(up_FD: Tensor, down_FD: Tensor, num_experts: int, activation: str) -> None:
    if up_FD.dim() != 2 or up_FD.shape != down_FD.shape or up_FD.dtype != down_FD.dtype:
        raise ValueError("up and down must be matrices [neurons, model] of one shape and type")
    if up_FD.device.type != "cpu" or down_FD.device.type != "cpu":
        raise ValueError("up and down must be on the CPU")
    if num_experts < 1 or up_FD.shape[0] % num_experts:
        raise ValueError(f"num_experts must divide the {up_FD.shape[0]} neurons, not {num_experts}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, not {activation!r}")
