"""The experts' FFN over token-expert pairs, and the choice of these pairs, on the CPU's kernels.

Shapes: T tokens, D model, F neurons, E experts, S neurons per expert, P token-expert pairs,
U experts in use.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.cpu.linear import in_panels, padded_bias, panel_width
from engine.cpu.native import (
    FLOAT,
    INT,
    LONG,
    call,
    compiled,
    lanes,
    pointer,
    scratch,
    weight_memory,
)
from engine.model.activations import activate_reference, gated_reference

_ACTIVATIONS: Final = {"relu": 1, "relu2": 2, "fatrelu": 3, "drelu": 4}
# Lists of all pairs up to this length are cached: decoding needs the same short ones every step.
_KEPT_PAIRS: Final = 1 << 14


@dataclass(frozen=True)
class Pairs:
    """Token-expert pairs, sorted by expert and then by token.

    Attributes:
        used: U, how many experts are in use.
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


def choose(x_TD: Tensor, router_ED: Tensor, k_T: Tensor, mass_T: Tensor) -> Tensor:
    """The experts of every token by the rule of `engine.model.routing`, bool [T, E].

    Args:
        x_TD: [T, D], float32 or bfloat16.
        router_ED: [E, D], float32.
        k_T, mass_T: int32 and float32 [T].
    """
    x_TD = x_TD.contiguous()
    (T, D), E = x_TD.shape, router_ED.shape[0]
    chosen_TE = torch.empty(T, E, dtype=torch.bool)
    call(
        "choose", x_TD.dtype, pointer(x_TD), pointer(router_ED), pointer(k_T), pointer(mass_T),
        pointer(chosen_TE), LONG(T), LONG(E), LONG(D),
    )  # fmt: skip
    return chosen_TE


def sort_pairs(chosen_TE: Tensor) -> Pairs:
    """The pairs of a choice, bool [T, E]."""
    chosen_TE = chosen_TE.contiguous()
    T, E = chosen_TE.shape
    numbers = torch.empty(2 * E + 1 + T * E, dtype=torch.int32)
    expert, offsets, token = numbers[:E], numbers[E : 2 * E + 1], numbers[2 * E + 1 :]
    used = compiled().sort_pairs(
        *map(pointer, (chosen_TE, expert, offsets, token)), LONG(T), LONG(E)
    )
    return Pairs(used, expert, offsets, token)


def every_pair(T: int, E: int) -> Pairs:
    """The pairs of every token with all experts, which make the FFN dense."""
    return _few_pairs(T, E) if T * E <= _KEPT_PAIRS else _every_pair(T, E)


def _every_pair(T: int, E: int) -> Pairs:
    # the result may be cached, so it must not be an inference tensor
    with torch.inference_mode(False):
        return Pairs(
            E,
            torch.arange(E, dtype=torch.int32),
            torch.arange(E + 1, dtype=torch.int32) * T,
            torch.arange(T, dtype=torch.int32).repeat(E),
        )


_few_pairs = functools.lru_cache(maxsize=64)(_every_pair)


class FFNExtras(NamedTuple):
    """The optional parts of an FFN beside its two matrices.

    Attributes:
        gate_FD: [F, D]: activations become act(x @ gate.T) * (x @ up.T + up_bias).
        up_bias_F, down_bias_D: biases of the two products.
        threshold: where the activation "fatrelu" begins.
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
        odd = self.expert_size % 2  # the kernels read inputs in pairs
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
            "expert_ffn", self.dtype, pointer(x_TD), pointer(self.up), pointer(self.down),
            pointer(self.gate), pointer(self.up_bias), pointer(self.down_bias),
            pointer(pairs.expert_U), pointer(pairs.offsets), pointer(pairs.token_P),
            LONG(pairs.used), LONG(T), LONG(D), LONG(S), INT(self.width // lanes()),
            INT(self.down_width // lanes()), INT(self.code), FLOAT(self.threshold), pointer(h),
            pointer(y_TD), pointer(out_TD),
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
            "linear", self.dtype, pointer(x_TD), pointer(packed), pointer(bias), pointer(y_TN),
            LONG(T), LONG(self.num_experts * padded), LONG(self.model),
            INT(self.width // lanes()),
        )  # fmt: skip
        return y_TN.view(T, self.num_experts, padded)[:, :, : self.expert_size].flatten(1)
