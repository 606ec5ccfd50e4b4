"""The FFN of experts by the GPU's kernels, for inference. Nothing here waits for the device.

Shapes: T tokens, D model, F neurons, E experts, S neurons per expert, K chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.gpu.add_norm import Norm
from engine.gpu.arrivals import Arrivals
from engine.gpu.ffn import all_experts, few_tokens, many_tokens, used_experts
from engine.gpu.ffn.cheapest_way import FFNShape, cheapest_way, one_pass_is_cheaper
from engine.gpu.routing.choose_few import MOST_TOKENS, choose_few
from engine.gpu.routing.choose_many import choose_many
from engine.gpu.routing.pairs import sort_pairs
from engine.gpu.routing.rule import Choice
from engine.gpu.thin_linear import thin_linear
from engine.model.ffn import ExpertFFN, FeedForward, mixture
from engine.model.policy_batch import PolicyBatch
from engine.model.trace import Trace

_First = TypeVar("_First")
_Second = TypeVar("_Second")


class KernelFFN(FeedForward):
    """An `ExpertFFN` on CUDA, whose weights stay where they are.

    Args:
        ffn: the weights.
        arrivals: counters of this FFN alone.
    """

    def __init__(self, ffn: ExpertFFN, arrivals: Arrivals) -> None:
        self.ffn = ffn
        self.num_experts = ffn.num_experts
        self._arrivals = arrivals
        # What the kernels for models with gates, biases or a threshold take beside the others.
        self._extras: dict[str, Any] = {}
        if not ffn.is_plain:
            self._extras = {"gate_FD": ffn.gate, "threshold": ffn.threshold}
            self._extras |= {"up_bias_F": ffn.up_bias, "down_bias_D": ffn.down_bias}
        shape = ffn.up.shape[1], ffn.num_experts, ffn.expert_size
        self._shape = FFNShape(*shape, ffn.up.element_size())

    def hidden(self, x_TD: Tensor) -> Tensor:
        return self.ffn.hidden(x_TD)

    def mass_of(self, hidden_TF: Tensor) -> Tensor:
        return self.ffn.mass_of(hidden_TF)

    def dense(self, x_TD: Tensor, trace: Trace | None = None) -> Tensor:
        return self.ffn.dense(x_TD, trace)

    def sparse(self, x_TD: Tensor, policy: PolicyBatch) -> tuple[Tensor, Tensor]:
        return self._sparse(x_TD, policy.k_T, policy.mass_T, policy.max_k, policy.quarters)

    def mixed(self, x_TD: Tensor, policy: PolicyBatch) -> tuple[Tensor, Tensor]:
        """Together by dense products, or each kind of token apart, whichever costs less."""
        counts = policy.count(dense=True), policy.count(dense=False)
        together = one_pass_is_cheaper(self._shape, *counts, policy.max_k)
        if self.ffn.is_plain and together:
            return self._all_experts(x_TD, policy.k_T, policy.mass_T, self.num_experts)
        rows, dense_rows = policy.sparse_rows, policy.dense_rows
        limits = policy.k_T[rows], policy.mass_T[rows], policy.max_k, policy.quarters
        sparse_nD, chosen_nE = self._sparse(x_TD[rows], *limits)
        return mixture(sparse_nD, chosen_nE, rows, self.dense(x_TD[dense_rows]), dense_rows)

    def add_to_token(
        self,
        x_1D: Tensor,
        norm: Norm,
        policy: PolicyBatch,
        arrivals: Arrivals,
        chosen_1E: Tensor | None,
    ) -> Tensor:
        """x + FFN(norm(x)) of one token, by a plain FFN.

        Args:
            x_1D: contiguous, not normed yet.
            norm: of x.
            policy: of the token.
            arrivals: counters that no kernel of another stream uses at the same time.
            chosen_1E: where to write the choice of a sparse token; None if it is dense.
        """
        ffn = self.ffn
        if chosen_1E is None:
            h_1F = thin_linear(x_1D, ffn.up, norm=norm, activation=ffn.activation)
            return torch.addmm(x_1D, h_1F, ffn.down)
        limits = policy.k_T, policy.mass_T, policy.max_k
        choice = choose_few(x_1D, ffn.router, *limits, arrivals, norm, chosen_1E)
        ids_1K, shape = choice.ids_TK, (ffn.expert_size, ffn.activation)
        h_1KS = few_tokens.first_product(x_1D, ffn.up, ids_1K, *shape, norm=norm)
        return few_tokens.second_product(h_1KS, ffn.down, ids_1K, arrivals, add_to=x_1D)

    def _sparse(
        self, x_TD: Tensor, k_T: Tensor, mass_T: Tensor, max_k: int, quarters: int
    ) -> tuple[Tensor, Tensor]:
        ffn = self.ffn
        way = cheapest_way(self._shape, x_TD.shape[0], max_k, quarters)
        if way in ("all_experts", "used_experts") and not ffn.is_plain:
            way = "many_tokens"
        if way == "all_experts":
            return self._all_experts(x_TD, k_T, mass_T, max_k)
        choice = self._select(x_TD, k_T, mass_T, max_k)
        weights = x_TD, ffn.up, ffn.down
        if way == "few_tokens":
            shape = ffn.expert_size, ffn.activation
            y_TD = few_tokens.ffn(*weights, choice.ids_TK, *shape, self._arrivals, **self._extras)
        elif way == "used_experts":
            y_TD = used_experts.ffn(*weights, choice.chosen_TE, ffn.activation)
        else:
            pairs = sort_pairs(choice)
            y_TD = many_tokens.ffn(*weights, pairs, ffn.activation, **self._extras)
        return y_TD, choice.chosen_TE

    def _all_experts(
        self, x_TD: Tensor, k_T: Tensor, mass_T: Tensor, max_k: int
    ) -> tuple[Tensor, Tensor]:
        ffn = self.ffn
        chosen_TE, h_TF = side_by_side(
            lambda: self._select(x_TD, k_T, mass_T, max_k).chosen_TE,
            lambda: x_TD @ ffn.up.T,
        )
        h_TF = all_experts.activate_chosen(h_TF, chosen_TE, ffn.activation)
        return h_TF @ ffn.down, chosen_TE

    def _select(self, x_TD: Tensor, k_T: Tensor, mass_T: Tensor, max_k: int) -> Choice:
        """The choice, in one launch for few tokens, in two for many."""
        router_ED = self.ffn.router
        if x_TD.shape[0] > MOST_TOKENS:
            return choose_many(x_TD, router_ED, k_T, mass_T, max_k)
        return choose_few(x_TD, router_ED, k_T, mass_T, max_k, self._arrivals)


def side_by_side(
    beside: Callable[[], _First], main: Callable[[], _Second]
) -> tuple[_First, _Second]:
    """Both results; while a CUDA graph is captured, as two branches that run at the same time."""
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return beside(), main()
    current = torch.cuda.current_stream()
    branch: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    branch.wait_stream(current)
    with torch.cuda.stream(branch):
        first = beside()
    second = main()
    current.wait_stream(branch)
    return first, second
