"""The CPU's own kernels: products with packed weights, chosen experts, paged attention.

torch's operators read a weight at half the memory's bandwidth when tokens are few, and cost tens of
microseconds each. These are C, compiled on first use (build.py), and called with pointers. Each
function here states its contract. Their references are torch's operators,
`sliced_ffn.sparse_ffn_reference` for the experts, and `routing.choose_reference` and
`sharing.share_reference` for the choice.

A token's result does not depend on the batch: every sum is taken in an order that the token's own
data decide, whatever the company, the number of threads or the path (few tokens, many). Only
the choice of tokens that share is meant to look at the batch.

Shapes: T tokens, D model, F neurons, E experts, S neurons per expert, P token-expert pairs,
U experts in use, N outputs, K inputs, H query heads, G key-value heads, d head dimension,
B sequences, L layers.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.cpu.build import library
from engine.gpu.ffn.activations import activate_reference, gated_reference

DTYPES: Final = (torch.float32, torch.bfloat16)
KV_BLOCK: Final = 16  # tokens of one block of keys and values
_ACTIVATIONS: Final = {"relu": 1, "relu2": 2, "fatrelu": 3, "drelu": 4}
_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_KEPT_PAIRS: Final = 1 << 14  # what is decoded over and over is worth keeping
_local = threading.local()


def available() -> bool:
    """Whether the kernels could be compiled here."""
    return library() is not None


def supports(dtype: torch.dtype, hidden_size: int, head_dim: int = 32) -> bool:
    """Whether a model of this type and shape runs on them: full vectors in every row.

    `head_dim` is attention's; an FFN alone has none.
    """
    return available() and dtype in DTYPES and hidden_size % 32 == 0 and head_dim % 32 == 0


def call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    lib = library()
    assert lib is not None
    assert dtype in DTYPES
    function = getattr(lib, f"{name}_{'half' if dtype == torch.bfloat16 else 'float'}")
    function(*arguments, _INT(torch.get_num_threads()))


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return _POINTER(None if tensor is None else tensor.data_ptr())


def scratch(name: str, elements: int, dtype: torch.dtype) -> Tensor:
    """Working memory of this thread, overwritten by the next call that asks for this name."""
    held: dict[tuple[str, torch.dtype], Tensor] = _local.__dict__.setdefault("held", {})
    found = held.get((name, dtype))
    if found is None or found.numel() < elements:
        with torch.inference_mode(False):
            found = held[name, dtype] = torch.empty(elements, dtype=dtype)
    return found


# --- memory --------------------------------------------------------------------------------------


_HUGE_PAGE: Final = 2 << 20
_MADV_HUGEPAGE: Final = 14  # Linux, <asm-generic/mman-common.h>


def weight_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for weights, in huge pages where Linux grants them.

    Rows of a weight are a page or more apart: in small pages, looking addresses up costs a tenth to
    a third of the time.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _HUGE_PAGE or sys.platform != "linux":
        return torch.empty(shape, dtype=dtype)
    held = torch.empty(size + _HUGE_PAGE, dtype=torch.uint8)
    offset = -held.data_ptr() % _HUGE_PAGE
    address = _POINTER(held.data_ptr() + offset)
    ctypes.CDLL(None).madvise(address, ctypes.c_size_t(size), _MADV_HUGEPAGE)  # a mere wish
    return held[offset : offset + size].view(dtype).view(shape)


# --- linear layers -------------------------------------------------------------------------------


def panel_width(outputs: int) -> int:
    """Columns of a panel, 1, 2 or 4 vectors: as many as fill registers, as few as pad little."""
    one = lanes()
    if outputs % (4 * one) == 0:
        return 4 * one
    return 2 * one if outputs % (2 * one) == 0 or outputs > 4 * one else one


def pack(weight_NK: Tensor, width: int) -> Tensor:
    """`in_panels` in memory of its own."""
    panels = in_panels(weight_NK, width)
    return weight_memory(tuple(panels.shape), weight_NK.dtype).copy_(panels)


def in_panels(weight_NK: Tensor, width: int) -> Tensor:
    """[N, K] as panels of `width` outputs, input by input; in bfloat16, pairs of inputs. A view.

    Returns [panels, K, width] in float32, [panels, K / 2, width, 2] in bfloat16; the last panel is
    padded with zeros.
    """
    N, K = weight_NK.shape
    panels = -(-N // width)
    padded = F.pad(weight_NK, (0, 0, 0, panels * width - N)) if N % width else weight_NK
    if weight_NK.dtype == torch.bfloat16:
        return padded.view(panels, width, K // 2, 2).permute(0, 2, 1, 3)
    return padded.view(panels, width, K).transpose(1, 2)


def unpack(packed: Tensor, outputs: int) -> Tensor:
    """The inverse of `pack`: [N, K]."""
    if packed.dtype == torch.bfloat16:
        rows = packed.permute(0, 2, 1, 3).reshape(packed.shape[0] * packed.shape[2], -1)
    else:
        rows = packed.transpose(1, 2).reshape(packed.shape[0] * packed.shape[2], -1)
    return rows[:outputs]


def padded_bias(bias_N: Tensor, width: int) -> Tensor:
    """float32, with zeros up to whole panels."""
    bias = bias_N.detach().float()
    return F.pad(bias, (0, -bias.shape[-1] % width)).contiguous()


class PackedLinear:
    """``y = x @ weight.T + bias`` from one packed copy of the weight; the caller may free its own.

    Args:
        weight_NK: [N, K], float32 or bfloat16, K even.
        bias_N: [N], if any.
    """

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> None:
        self.outputs, self.inputs = weight_NK.shape
        self.dtype = weight_NK.dtype
        self.width = panel_width(self.outputs)
        self.packed = pack(weight_NK.detach(), self.width)
        self.bias = None if bias_N is None else padded_bias(bias_N, self.width)

    def __call__(self, x_TK: Tensor) -> Tensor:
        """[T, K] -> [T, N], both in the weight's type."""
        assert x_TK.dtype == self.dtype
        x_TK = x_TK.contiguous()
        T = x_TK.shape[0]
        y_TN = torch.empty(T, self.outputs, dtype=self.dtype)
        call(
            "linear", self.dtype, _pointer(x_TK), _pointer(self.packed), _pointer(self.bias),
            _pointer(y_TN), _LONG(T), _LONG(self.outputs), _LONG(self.inputs),
            _INT(self._vectors()),
        )  # fmt: skip
        return y_TN

    def _vectors(self) -> int:
        return self.width // lanes()

    def rows(self, ids_T: Tensor) -> Tensor:
        """Rows of the weight, [T, K]: an embedding and an output layer can share one copy."""
        panel_T, column_T = ids_T // self.width, ids_T % self.width
        if self.dtype == torch.bfloat16:
            return self.packed[panel_T, :, column_T].flatten(1)
        return self.packed[panel_T, :, column_T]


def lanes() -> int:
    """float32 numbers of one vector of this processor."""
    lib = library()
    assert lib is not None
    return int(lib.lanes())


# --- experts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Token-expert pairs, sorted by expert and then by token.

    Attributes:
        used: U.
        expert_U: int32 [>= U], the experts in use, ascending.
        offsets: int32 [>= U + 1]; the tokens of the u-th are token_P[offsets[u] : offsets[u + 1]].
        token_P: int32 [>= P].
    """

    used: int
    expert_U: Tensor
    offsets: Tensor
    token_P: Tensor

    @property
    def count(self) -> int:
        return int(self.offsets[self.used])


def choose(
    x_TD: Tensor, router_ED: Tensor, k_T: Tensor, mass_T: Tensor, shared_T: Tensor | None = None
) -> Tensor:
    """The experts of every token by the rule of `routing.choose_reference`, bool [T, E].

    Args:
        x_TD: [T, D], float32 or bfloat16.
        router_ED: [E, D], float32.
        k_T, mass_T: int32 and float32 [T].
        shared_T: int32 [T], for the rule of `sharing.share_reference` after that; None if no token
            shares.
    """
    x_TD = x_TD.contiguous()
    (T, D), E = x_TD.shape, router_ED.shape[0]
    chosen_TE = torch.empty(T, E, dtype=torch.bool)
    scores_TE = torch.empty(T, E, dtype=torch.float32) if shared_T is not None else None
    call(
        "choose", x_TD.dtype, _pointer(x_TD), _pointer(router_ED), _pointer(k_T), _pointer(mass_T),
        _pointer(scores_TE), _pointer(chosen_TE),
        _LONG(T), _LONG(E), _LONG(D),
    )  # fmt: skip
    if scores_TE is not None and shared_T is not None:
        lib = library()
        assert lib is not None
        pointers = map(_pointer, (scores_TE, shared_T, chosen_TE))
        lib.share(*pointers, _LONG(T), _LONG(E), _INT(torch.get_num_threads()))
    return chosen_TE


def sort_pairs(chosen_TE: Tensor) -> Pairs:
    """The pairs of a choice, bool [T, E]."""
    lib = library()
    assert lib is not None
    chosen_TE = chosen_TE.contiguous()
    T, E = chosen_TE.shape
    numbers = torch.empty(2 * E + 1 + T * E, dtype=torch.int32)
    expert, offsets, token = numbers[:E], numbers[E : 2 * E + 1], numbers[2 * E + 1 :]
    used = lib.sort_pairs(*map(_pointer, (chosen_TE, expert, offsets, token)), _LONG(T), _LONG(E))
    return Pairs(used, expert, offsets, token)


def every_pair(T: int, E: int) -> Pairs:
    """All experts for every token: the dense FFN."""
    return _few_pairs(T, E) if T * E <= _KEPT_PAIRS else _every_pair(T, E)


def _every_pair(T: int, E: int) -> Pairs:
    with torch.inference_mode(False):  # may be kept, so usable in any mode afterwards
        return Pairs(
            E,
            torch.arange(E, dtype=torch.int32),
            torch.arange(E + 1, dtype=torch.int32) * T,
            torch.arange(T, dtype=torch.int32).repeat(E),
        )


_few_pairs = functools.lru_cache(maxsize=64)(_every_pair)


class FFNExtras(NamedTuple):
    """What an FFN may have beside two matrices.

    Attributes:
        gate_FD: [F, D]: activations become act(x @ gate.T) * (x @ up.T + up_bias).
        up_bias_F, down_bias_D: biases of the two products.
        threshold: of the activation "fatrelu".
    """

    gate_FD: Tensor | None = None
    up_bias_F: Tensor | None = None
    down_bias_D: Tensor | None = None
    threshold: float = 0.0


class PackedExpertFFN:
    """``act(x @ up.T) @ down`` over chosen experts, from one copy of the weights.

    All matrices are packed; the caller may free its own. Where an expert has one token and most of
    its neurons are silent, their weights in `down` are not even read.

    Args:
        up_FD, down_FD: [F, D], float32 or bfloat16; expert e owns rows e*S .. (e+1)*S.
        num_experts: E; divides F.
        activation: "relu"; "relu2", its square; "fatrelu", zero up to a threshold; "drelu", ReLU of
            the gate and of what it multiplies.
        extras: a gate, biases, the threshold.
    """

    def __init__(
        self,
        up_FD: Tensor,
        down_FD: Tensor,
        num_experts: int,
        activation: str,
        extras: FFNExtras | None = None,
    ) -> None:
        extras = extras or FFNExtras()
        (self.neurons, self.model), self.dtype = up_FD.shape, up_FD.dtype
        self.num_experts, self.activation = num_experts, activation
        self.code, self.threshold = _ACTIVATIONS[activation], extras.threshold
        self.expert_size = self.neurons // num_experts
        self.width, self.down_width = panel_width(self.expert_size), panel_width(self.model)
        shape = (num_experts, self.expert_size, self.model)
        ups, downs = up_FD.detach().view(shape), down_FD.detach().view(shape)
        self.up = self._packed(ups.unbind(0), self.width)
        odd = self.expert_size % 2  # inputs come in pairs
        self.down = self._packed([F.pad(d, (0, 0, 0, odd)).T for d in downs], self.down_width)
        gate, bias, self.down_bias = extras.gate_FD, extras.up_bias_F, None
        self.gate = gate
        if gate is not None:
            self.gate = self._packed(gate.detach().view(shape).unbind(0), self.width)
        self.up_bias = bias
        if bias is not None:
            self.up_bias = padded_bias(bias.view(num_experts, self.expert_size), self.width)
        if extras.down_bias_D is not None:
            self.down_bias = padded_bias(extras.down_bias_D, self.down_width)

    def _packed(self, weights: Sequence[Tensor], width: int) -> Tensor:
        """One matrix [outputs, inputs] an expert, packed one after another."""
        shape = (len(weights), *in_panels(weights[0], width).shape)
        packed = weight_memory(shape, self.dtype)
        for to, weight in zip(packed, weights, strict=True):
            to.copy_(in_panels(weight, width))
        return packed

    def __call__(self, x_TD: Tensor, pairs: Pairs) -> Tensor:
        """[T, D] and the pairs of its tokens -> [T, D], in the weights' type."""
        assert x_TD.dtype == self.dtype
        x_TD = x_TD.contiguous()
        T, D, S = x_TD.shape[0], self.model, self.expert_size
        out_TD = torch.empty_like(x_TD)
        h = scratch("h", pairs.count * (S + S % 2), self.dtype)
        y_TD = scratch("y", T * D, torch.float32)
        call(
            "expert_ffn", self.dtype, _pointer(x_TD), _pointer(self.up), _pointer(self.down),
            _pointer(self.gate), _pointer(self.up_bias), _pointer(self.down_bias),
            _pointer(pairs.expert_U), _pointer(pairs.offsets), _pointer(pairs.token_P),
            _LONG(pairs.used), _LONG(T), _LONG(D), _LONG(S), _INT(self.width // lanes()),
            _INT(self.down_width // lanes()), _INT(self.code), _FLOAT(self.threshold), _pointer(h),
            _pointer(y_TD), _pointer(out_TD),
        )  # fmt: skip
        return out_TD

    def hidden(self, x_TD: Tensor) -> Tensor:
        """The activations of all neurons, [T, F]."""
        up_TF = self._first(x_TD, self.up, self.up_bias)
        if self.gate is None:
            return activate_reference(up_TF, self.activation, self.threshold)
        gate_TF = self._first(x_TD, self.gate, None)
        return gated_reference(gate_TF, up_TF, self.activation, self.threshold)

    def _first(self, x_TD: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias`` over all neurons, [T, F].

        The experts' panels lie one after another, so they are one packed matrix, whose outputs
        include the padding of each expert's last panel.
        """
        assert x_TD.dtype == self.dtype
        x_TD = x_TD.contiguous()
        T, padded = x_TD.shape[0], self.up.shape[1] * self.width
        y_TN = torch.empty(T, self.num_experts * padded, dtype=self.dtype)
        call(
            "linear", self.dtype, _pointer(x_TD), _pointer(packed), _pointer(bias), _pointer(y_TN),
            _LONG(T), _LONG(self.num_experts * padded), _LONG(self.model),
            _INT(self.width // lanes()),
        )  # fmt: skip
        return y_TN.view(T, self.num_experts, padded)[:, :, : self.expert_size].flatten(1)


# --- the steps between ---------------------------------------------------------------------------


def add_scaled_(x_TD: Tensor, delta_TD: Tensor, multiplier: float) -> Tensor:
    """x + multiplier * delta, [T, D], rounded to its type once; replaces x in place."""
    T, D = x_TD.shape
    call(
        "add_scaled", x_TD.dtype, _pointer(x_TD), _pointer(delta_TD), _LONG(T), _LONG(D),
        _FLOAT(multiplier),
    )  # fmt: skip
    return x_TD


def rms_norm(
    x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float, multiplier: float = 1.0
) -> Tensor:
    """RMSNorm (Zhang and Sennrich, 2019) of `add_scaled_`, [T, D]; the sum replaces x in place."""
    T, D = x_TD.shape
    out_TD = torch.empty_like(x_TD)
    call(
        "rms_norm", x_TD.dtype, _pointer(x_TD), _pointer(delta_TD), _pointer(weight_D),
        _pointer(out_TD), _LONG(T), _LONG(D), _FLOAT(multiplier), _FLOAT(eps),
    )  # fmt: skip
    return out_TD


def layer_norm(
    x_TD: Tensor,
    delta_TD: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    multiplier: float = 1.0,
) -> Tensor:
    """LayerNorm (Ba et al. 2016) of `add_scaled_`, [T, D]; the sum replaces x in place."""
    T, D = x_TD.shape
    out_TD = torch.empty_like(x_TD)
    call(
        "layer_norm", x_TD.dtype, _pointer(x_TD), _pointer(delta_TD), _pointer(weight_D),
        _pointer(bias_D), _pointer(out_TD), _LONG(T), _LONG(D), _FLOAT(multiplier), _FLOAT(eps),
    )  # fmt: skip
    return out_TD


def rotate_(x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """`attention.rotate` in place, on heads that lie one after another in each row."""
    T, heads, d = x_THd.shape
    call(
        "rotate", x_THd.dtype, _pointer(x_THd), _pointer(cos_Td), _pointer(sin_Td), _LONG(T),
        _LONG(heads), _LONG(d), _LONG(x_THd.stride(0)),
    )  # fmt: skip
    return x_THd


# --- attention -----------------------------------------------------------------------------------


class PagedCache:
    """Keys and values of L layers in blocks of KV_BLOCK tokens; keys are packed for their product.

    Attributes:
        window: last tokens that a token sees, itself included; 0: all.
        keys: [L, blocks, G, d * KV_BLOCK]: inputs by tokens, in bfloat16 in pairs of inputs.
        values: [L, blocks, G, KV_BLOCK * d].
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        window: int = 0,
    ) -> None:
        blocks = slots // KV_BLOCK
        self.window = window
        self.heads, self.head_dim, self.dtype = heads, head_dim, dtype
        shape = (layers, blocks, heads, head_dim * KV_BLOCK)
        self.keys = torch.zeros(shape, dtype=dtype)
        self.values = torch.zeros(shape, dtype=dtype)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def store(self, layer: int, slot_T: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> None:
        """Put keys and values [T, G, d] into slots, int64 [T]; heads lie together in each row."""
        T, G, d = k_TGd.shape
        call(
            "store_kv", self.dtype, _pointer(k_TGd), _pointer(v_TGd), _pointer(slot_T),
            _pointer(self.keys[layer]), _pointer(self.values[layer]), _LONG(T), _LONG(G), _LONG(d),
            _LONG(k_TGd.stride(0)), _LONG(v_TGd.stride(0)),
        )  # fmt: skip

    def attend(
        self,
        layer: int,
        q_THd: Tensor,
        table_BM: Tensor,
        first_B: Tensor,
        rows_B: Tensor,
        context_B: Tensor,
    ) -> Tensor:
        """Causal attention of every row over its own sequence: [T, H, d].

        Args:
            q_THd: queries; heads lie together in each row.
            table_BM: int32, the KV_BLOCK-blocks of each sequence.
            first_B, rows_B: int32, each sequence's first row in the batch, and how many.
            context_B: int32, tokens of each sequence in the cache, its rows of this batch included.
        """
        T, H, d = q_THd.shape
        out_THd = torch.empty(T, H, d, dtype=self.dtype)
        B, M = table_BM.shape
        call(
            "attend", self.dtype, _pointer(q_THd), _pointer(self.keys[layer]),
            _pointer(self.values[layer]), _pointer(table_BM), _pointer(first_B), _pointer(rows_B),
            _pointer(context_B), _pointer(out_THd), _LONG(B), _LONG(H), _LONG(self.heads), _LONG(d),
            _LONG(q_THd.stride(0)), _LONG(M), _LONG(self.window), _FLOAT(d**-0.5),
        )  # fmt: skip
        return out_THd
