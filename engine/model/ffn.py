"""The FFN of experts, which runs dense or sparse per token.

    FFN(x) = act(x @ up.T) @ down

is computed over all rows (dense) or over the chosen experts' rows (sparse). No gate multiplies an
expert's output, so choosing every expert is the dense FFN. Imported models may have biases, or a
gate for each neuron: FFN(x) = (act(x @ gate.T) * (x @ up.T)) @ down.

`ExpertFFN` holds the weights and computes with torch's operators: it trains, and is the reference.
`FeedForward` is the interface of everything that computes this function; engine/cpu and engine/gpu
implement it with kernels.

Shapes: T tokens, D model, F neurons, E experts, S neurons per expert, K chosen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.model.activations import ACTIVATIONS, activate_reference, gated_reference
from engine.model.experts import mass_of
from engine.model.policy_batch import PolicyBatch
from engine.model.routing import choose_reference
from engine.model.sliced_ffn import sparse_ffn
from engine.model.trace import Trace


class FeedForward(ABC):
    """An FFN of experts over a flat batch, each token by its own policy."""

    num_experts: int

    def __call__(self, x_TD: Tensor, policy: PolicyBatch, trace: Trace | None = None) -> Tensor:
        return self.forward(x_TD, policy, trace)

    def forward(self, x_TD: Tensor, policy: PolicyBatch, trace: Trace | None = None) -> Tensor:
        """[T, D] -> [T, D], each token by its own policy; records the choice in `trace`."""
        if policy.all_dense:
            chosen_TE = None
            y_TD = self.dense(x_TD, trace)
        elif policy.dense is None:
            y_TD, chosen_TE = self.sparse(x_TD, policy)
        else:
            y_TD, chosen_TE = self.mixed(x_TD, policy)
        if trace is not None:
            if trace.mass_every and chosen_TE is not None:
                self._record_mass(x_TD[:: trace.mass_every], trace)
            trace.add(x_TD, chosen_TE, self.num_experts)
        return y_TD

    @abstractmethod
    def dense(self, x_TD: Tensor, trace: Trace | None = None) -> Tensor:
        """Compute every neuron; records the experts' mass in `trace` if it is wanted."""

    @abstractmethod
    def sparse(self, x_TD: Tensor, policy: PolicyBatch) -> tuple[Tensor, Tensor]:
        """The chosen experts only, of a batch without dense tokens: (y [T, D], chosen [T, E])."""

    @abstractmethod
    def mixed(self, x_TD: Tensor, policy: PolicyBatch) -> tuple[Tensor, Tensor]:
        """What `sparse` computes, for a batch where some tokens are dense."""

    @abstractmethod
    def hidden(self, x_TD: Tensor) -> Tensor:
        """The activations of all neurons, [T, F]."""

    @abstractmethod
    def mass_of(self, hidden_TF: Tensor) -> Tensor:
        """The mass of each expert, [T, E], from `hidden`."""

    def _record_mass(self, sampled_nD: Tensor, trace: Trace) -> None:
        """The true mass of every expert, which takes the whole first product."""
        hidden_nF = self.hidden(sampled_nD)
        trace.masses.append(self.mass_of(hidden_nF))
        if trace.count_fired:
            trace.fired.append((hidden_nF != 0).sum(-1))


class SparseTraining(Protocol):
    """A faster way to train the chosen experts of a plain FFN; engine/gpu has one."""

    def __call__(
        self, ffn: ExpertFFN, x_TD: Tensor, scores_TE: Tensor, k: int
    ) -> tuple[Tensor, Tensor] | None:
        """(y [T, D], chosen bool [T, E]) of the k best experts, differentiable in x, up and down.

        Returns None if it does not support this input.
        """


class ExpertFFN(nn.Module, FeedForward):
    """The weights of an FFN, neuron by neuron, and the function in torch's operators.

    Parameters `up` and `down` are [F, D]; the buffer `router` is [E, D], float32. `gate` [F, D],
    `up_bias` [F] and `down_bias` [D] are None unless the model has them.

    Attributes:
        is_plain: whether it is act(x @ up.T) @ down with ReLU or its square, which all kernels
            support.
        training_kernels: how sparse training steps are computed, where not by torch's operators.
    """

    router: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts = config.experts.num_experts
        self.activation = config.hidden_act
        self.threshold = config.hidden_act_param
        shape = (config.intermediate_size, config.hidden_size)
        self.up = nn.Parameter(torch.empty(shape))
        self.down = nn.Parameter(torch.empty(shape))
        self.gate = nn.Parameter(torch.empty(shape)) if config.gated_mlp else None
        self.up_bias = nn.Parameter(torch.empty(shape[0])) if config.mlp_bias else None
        self.down_bias = nn.Parameter(torch.empty(shape[1])) if config.mlp_bias else None
        plain = self.gate is None and self.up_bias is None
        self.is_plain = plain and self.activation in ACTIVATIONS
        router_shape = (self.num_experts, config.hidden_size)
        self.register_buffer("router", torch.zeros(router_shape, dtype=torch.float32))
        self.training_kernels: SparseTraining | None = None

    forward = FeedForward.forward

    @property
    def expert_size(self) -> int:
        return self.up.shape[0] // self.num_experts

    def per_neuron(self) -> list[nn.Parameter]:
        """The parameters whose rows are neurons."""
        found = (self.up, self.down, self.gate, self.up_bias)
        return [parameter for parameter in found if parameter is not None]

    def hidden(self, x_TD: Tensor) -> Tensor:
        up_TF = x_TD @ self.up.T
        if self.up_bias is not None:
            up_TF = up_TF + self.up_bias
        if self.gate is None:
            return activate_reference(up_TF, self.activation, self.threshold)
        return gated_reference(x_TD @ self.gate.T, up_TF, self.activation, self.threshold)

    def mass_of(self, hidden_TF: Tensor) -> Tensor:
        return mass_of(hidden_TF, self.num_experts, gated=self.gate is not None)

    def dense(self, x_TD: Tensor, trace: Trace | None = None) -> Tensor:
        hidden_TF = self.hidden(x_TD)
        if trace is not None and trace.mass_every:
            trace.masses.append(self.mass_of(hidden_TF[:: trace.mass_every]))
        return self._down(hidden_TF)

    def sparse(self, x_TD: Tensor, policy: PolicyBatch) -> tuple[Tensor, Tensor]:
        scores_TE = self.scores(x_TD, oracle=policy.oracle)
        if self.training_kernels is not None and policy.same_k is not None:
            found = self.training_kernels(self, x_TD, scores_TE, policy.same_k)
            if found is not None:
                return found
        chosen_TE = choose(scores_TE, policy)
        return self._chosen_only(x_TD, chosen_TE), chosen_TE

    def mixed(self, x_TD: Tensor, policy: PolicyBatch) -> tuple[Tensor, Tensor]:
        rows, dense_rows = policy.sparse_rows, policy.dense_rows
        chosen_nE = choose(self.scores(x_TD[rows], oracle=policy.oracle), policy, rows)
        sparse_nD = self._chosen_only(x_TD[rows], chosen_nE)
        return mixture(sparse_nD, chosen_nE, rows, self.dense(x_TD[dense_rows]), dense_rows)

    def scores(self, x_TD: Tensor, *, oracle: bool = False) -> Tensor:
        """Scores [T, E] whose softmax is the (predicted or true) share of activation mass."""
        if oracle:
            mass_TE = self.mass_of(self.hidden(x_TD))
            return mass_TE.detach().float().clamp_min(1e-30).log()
        return router_scores(x_TD, self.router)

    def _chosen_only(self, x_TD: Tensor, chosen_TE: Tensor) -> Tensor:
        """y [T, D] of the chosen experts."""
        if self.is_plain:
            return sparse_ffn(x_TD, self.up, self.down, chosen_TE, self.activation)
        chosen_TF = chosen_TE.repeat_interleave(self.expert_size, dim=1)
        return self._down(self.hidden(x_TD) * chosen_TF)

    def _down(self, hidden_TF: Tensor) -> Tensor:
        y_TD = hidden_TF @ self.down
        return y_TD if self.down_bias is None else y_TD + self.down_bias


def choose(scores_TE: Tensor, policy: PolicyBatch, rows: Tensor | None = None) -> Tensor:
    """The choice of every token, or of those in these rows of the batch, bool [T, E]."""
    if policy.same_k is not None:  # the usual case takes a quarter of the operators this way
        best_TK = scores_TE.topk(policy.same_k, sorted=False).indices
        return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, best_TK, True)
    k_T, mass_T = policy.k_T, policy.mass_T
    if rows is not None:
        k_T, mass_T = k_T[rows], mass_T[rows]
    return choose_reference(scores_TE, k_T, mass_T)


def router_scores(x_TD: Tensor, router_ED: Tensor) -> Tensor:
    """x @ router.T, float32 [T, E], without gradients."""
    x_TD = x_TD.detach().float()
    # near ties must be decided as in evaluation, whatever autocast says
    if torch.is_autocast_enabled(x_TD.device.type):
        with torch.autocast(x_TD.device.type, enabled=False):
            return x_TD @ router_ED.T
    return x_TD @ router_ED.T


def mixture(
    sparse_nD: Tensor, chosen_nE: Tensor, rows: Tensor, dense_mD: Tensor, dense_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs and choices of a whole batch from those of its sparse and of its dense tokens.

    Args:
        sparse_nD, chosen_nE: outputs and choices of the n sparse tokens.
        rows: their rows in the batch.
        dense_mD: outputs of the m dense tokens.
        dense_rows: their rows in the batch.

    Returns:
        (y [n + m, D], chosen bool [n + m, E]).
    """
    tokens = rows.numel() + dense_rows.numel()
    chosen_TE = chosen_nE.new_ones((tokens, chosen_nE.shape[1]))
    chosen_TE[rows] = chosen_nE
    y_TD = sparse_nD.new_empty((tokens, sparse_nD.shape[1])).index_copy(0, rows, sparse_nD)
    return y_TD.index_copy(0, dense_rows, dense_mD), chosen_TE
