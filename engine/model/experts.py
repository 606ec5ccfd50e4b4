"""Experts: the layout of neurons, the router, the choice, and the FFN that runs dense or sparse.

An expert is a contiguous slice of neurons. With `up [F, D]` and `down [F, D]` stored neuron by
neuron, expert e owns rows e*S .. (e+1)*S of both, and

    FFN(x) = act(x @ up.T) @ down

is computed over all rows (dense) or over the chosen experts' rows (sparse). No gate multiplies an
expert's output, so choosing every expert is the dense FFN. Imported models may have biases, or a
gate for each neuron: FFN(x) = (act(x @ gate.T) * (x @ up.T)) @ down.

Shapes: T tokens, D model, F neurons, E experts, S neurons per expert, P token-expert pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.cpu import native
from engine.errors import require
from engine.gpu import thin_linear
from engine.gpu.add_norm import Norm
from engine.gpu.arrivals import Arrivals
from engine.gpu.ffn import all_experts, few_tokens, many_tokens, used_experts
from engine.gpu.ffn import training as training_ffn
from engine.gpu.ffn.activations import ACTIVATIONS, activate_reference, gated_reference
from engine.gpu.ffn.cheapest_way import FFNShape, cheapest_way, one_pass_is_cheaper
from engine.gpu.routing.choose_few import MOST_TOKENS, choose_few
from engine.gpu.routing.choose_many import choose_many
from engine.gpu.routing.pairs import sort_pairs
from engine.gpu.routing.rule import Choice, choose_reference
from engine.model.sliced_ffn import sparse_ffn
from engine.serving.request import ExpertPolicy


@dataclass(frozen=True)
class ExpertLayout:
    """Which neuron goes where: row i of the new order is row `order_F[i]` of the old one.

    After `apply`, expert e owns rows e*S .. (e+1)*S. The same layout must be applied to every
    tensor that is indexed by neuron: `up`, `down`, and the optimiser's moments of both.
    """

    order_F: Tensor
    num_experts: int

    @classmethod
    def from_labels(cls, labels_F: Tensor, num_experts: int) -> Self:
        """Group neurons by their expert label, keeping the old order inside an expert.

        Raises:
            ConfigError: unless every one of the `num_experts` labels occurs equally often.
        """
        counts_E = torch.bincount(labels_F, minlength=num_experts)
        size = labels_F.numel() // num_experts
        require(
            counts_E.numel() == num_experts and bool((counts_E == size).all()),
            f"every expert must own exactly {size} neurons, got {counts_E.tolist()}",
        )
        return cls(torch.argsort(labels_F, stable=True), num_experts)

    @property
    def expert_size(self) -> int:
        return self.order_F.numel() // self.num_experts

    def apply(self, rows_F: Tensor) -> Tensor:
        """`rows_F` [F, ...] in the new order."""
        return rows_F[self.order_F.to(rows_F.device)]

    def inverse(self) -> ExpertLayout:
        """The layout that undoes this one."""
        return ExpertLayout(torch.argsort(self.order_F), self.num_experts)


def centroid_router(up_FD: Tensor, num_experts: int, norm: float = 1.0) -> Tensor:
    """Router rows from the experts' own neurons: [E, D].

    The mean of an expert's L2-normalised rows of `up`, renormalised, at one common norm for all
    experts (the released MoEfication/SSD clustering code; see docs/ssd.md). The common norm does
    not change any ranking; it sets how sharp the predicted shares softmax(scores) are.
    """
    unit_FD = nn.functional.normalize(up_FD.detach().float(), dim=1)
    mean_ED = unit_FD.view(num_experts, -1, up_FD.shape[1]).mean(1)
    return nn.functional.normalize(mean_ED, dim=1) * norm


def true_mass(x_TD: Tensor, up_FD: Tensor, num_experts: int, activation: str) -> Tensor:
    """Activation mass of each expert, [T, E]: the sum of its neurons' activations."""
    return mass_of(activate_reference(x_TD @ up_FD.T, activation), num_experts)


def mass_of(hidden_TF: Tensor, num_experts: int, *, gated: bool = False) -> Tensor:
    """The activations' mass by expert, [T, E]; of gated neurons by their absolute value."""
    hidden_TF = hidden_TF.abs() if gated else hidden_TF
    return hidden_TF.view(hidden_TF.shape[0], num_experts, -1).sum(-1)


@dataclass(frozen=True)
class PolicyBatch:
    """The expert policies of a flat batch, as tensors: one row a token.

    Attributes:
        k_T: most experts per token, int32; of one that shares, what it takes in any case. mass_T:
        predicted mass that suffices, float32; NO_MASS_LIMIT where it never binds. max_k: the
        largest k of the tokens that are not dense; 0 if all are dense. dense_rows: indices of dense
        tokens; None if there are none. sparse_rows: indices of the other tokens; None if there are
        no dense ones. same_k: the k of all those tokens, if it is one k and mass never binds; else
        None. shared_T: k of the tokens that share, on a CPU alone, 0 for others, int32;
        None if none does, as beside dense tokens.
        oracle: choose by true activation mass instead of the router (evaluation).
        quarters: of the experts that such batches use together, rounded up; 0: unknown.
    """

    k_T: Tensor
    mass_T: Tensor
    max_k: int
    dense_rows: Tensor | None
    sparse_rows: Tensor | None
    same_k: int | None = None
    oracle: bool = False
    shared_T: Tensor | None = None
    quarters: int = 0

    @classmethod
    def build(
        cls,
        policies: Sequence[tuple[ExpertPolicy, int]],
        num_experts: int,
        device: torch.device | str = "cpu",
    ) -> Self:
        """One entry per request in batch order: (its resolved policy, its number of tokens)."""
        # All experts by any name is the dense FFN; running it as such costs nothing.
        dense_entries = [
            p.kind == "dense" or (p.kind == "top_k" and p.value == num_experts) for p, _ in policies
        ]
        k: list[int] = []
        mass: list[float] = []
        shared: list[int] = []
        is_dense: list[bool] = []
        for (policy, tokens), dense in zip(policies, dense_entries, strict=True):
            policy_k, policy_mass = policy.limits(num_experts)
            shares = policy.kind == "shared"
            if shares and any(dense_entries):  # everything is read: a choice of its own
                policy_k, shares = policy_k, False
            k += [policy_k] * tokens
            mass += [policy_mass] * tokens
            shared += [policy_k if shares else 0] * tokens
            is_dense += [dense] * tokens
        oracle = {policy.kind == "oracle" for policy, _ in policies}
        assert len(oracle) <= 1, "oracle does not mix with other policies in one batch"
        dense_rows = [i for i, dense in enumerate(is_dense) if dense]
        sparse_rows = [i for i, dense in enumerate(is_dense) if not dense]

        limits = {(k[i], mass[i], shared[i]) for i in sparse_rows}
        alike = len(limits) == 1 and mass[sparse_rows[0]] > 1 and not any(shared)
        widest = [k[i] for i in sparse_rows]

        def tensor(values: list[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            k_T=tensor(k, torch.int32),
            mass_T=torch.tensor(mass, dtype=torch.float32, device=device),
            max_k=max(widest, default=0),
            dense_rows=tensor(dense_rows, torch.long) if dense_rows else None,
            sparse_rows=tensor(sparse_rows, torch.long) if dense_rows else None,
            same_k=k[sparse_rows[0]] if alike else None,
            oracle=True in oracle,
            shared_T=tensor(shared, torch.int32) if any(shared) else None,
        )

    @classmethod
    def uniform(
        cls, policy: ExpertPolicy, tokens: int, num_experts: int, device: torch.device | str = "cpu"
    ) -> Self:
        """The same policy for every one of `tokens` tokens."""
        return cls.build([(policy, tokens)], num_experts, device)

    @property
    def all_dense(self) -> bool:
        return self.max_k == 0


class Trace:
    """What the FFNs did in one forward pass, layer by layer.

    Attributes:
        keep_inputs: also keep each layer's input (training's penalty, evaluation).
        mass_every: also keep the true activation mass of every n-th token; 0: of none. It costs
            nothing where all neurons are computed anyhow.
        chosen: per layer, the choice [T, E]; None where every token used every expert.
        inputs: per layer, the FFN's input [T, D], if kept.
        masses: per layer, the true mass [T / n, E] of tokens 0, n, 2n and so on, if kept.
        count_fired: with `mass_every`, also count the neurons of those tokens that are not zero.
        fired: per layer, those counts [T / n], of batches that are not all dense.
    """

    # No dataclass: FSDP hands copies of those to the layers, and what a copy records is lost.
    def __init__(
        self, keep_inputs: bool = False, mass_every: int = 0, count_fired: bool = False
    ) -> None:
        self.keep_inputs = keep_inputs
        self.mass_every = mass_every
        self.count_fired = count_fired
        self.fired: list[Tensor] = []
        self.chosen: list[Tensor | None] = []
        self.inputs: list[Tensor] = []
        self.masses: list[Tensor] = []
        self._num_experts = 0
        self._num_tokens = 0

    def add(self, x_TD: Tensor, chosen_TE: Tensor | None, num_experts: int) -> None:
        """Record one layer; `chosen_TE` None means that every token used every expert."""
        self._num_experts, self._num_tokens = num_experts, x_TD.shape[0]
        self.chosen.append(chosen_TE)
        if self.keep_inputs:
            self.inputs.append(x_TD)

    def counts(self) -> tuple[Tensor, Tensor]:
        """Experts of each token, [L, T], and distinct experts of all tokens, [L], by layer."""
        chosen = self.choices()
        if not chosen:
            everything = torch.full((len(self.chosen), self._num_tokens + 1), self._num_experts)
            return everything[:, 1:], everything[:, 0]
        chosen_LTE = torch.stack(chosen)
        return chosen_LTE.sum(2), chosen_LTE.any(1).sum(1)

    def choices(self) -> list[Tensor]:
        """The choice of every layer, [T, E] each; none if the batch was dense."""
        chosen = [c for c in self.chosen if c is not None]
        assert len(chosen) in (0, len(self.chosen)), "a batch is dense in all layers or in none"
        return chosen


def released(weight: Tensor) -> nn.Parameter:
    """An empty parameter in place of one that has been packed: type and device stay known."""
    return nn.Parameter(weight.new_empty(0), requires_grad=False)


_First = TypeVar("_First")
_Second = TypeVar("_Second")


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


class ExpertFFN(nn.Module):
    """An FFN stored neuron by neuron that runs dense or sparse, per token.

    Parameters `up` and `down` are [F, D]; the buffer `router` is [E, D], float32. `gate` [F, D],
    `up_bias` [F] and `down_bias` [D] are None unless the model has them. Training uses
    differentiable Triton kernels on CUDA and plain products elsewhere, as evaluation does;
    `prepare` switches to the inference paths: packed weights on the CPU, Triton kernels on CUDA.
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
        # act(x @ up.T) @ down with ReLU or its square: what all kernels take.
        self.is_plain = self.gate is None and self.up_bias is None
        self.is_plain &= self.activation in ACTIVATIONS
        router_shape = (self.num_experts, config.hidden_size)
        self.register_buffer("router", torch.zeros(router_shape, dtype=torch.float32))
        self.packed: native.PackedExpertFFN | None = None
        self._use_kernels = False
        self._arrivals: Arrivals | None = None

    def per_neuron(self) -> list[nn.Parameter]:
        """The parameters whose rows are neurons."""
        found = (self.up, self.down, self.gate, self.up_bias)
        return [parameter for parameter in found if parameter is not None]

    def prepare(self) -> None:
        """Switch to the inference paths; on the CPU the packed form replaces all."""
        if self.up.is_cuda:
            self.use_kernels()
        elif self.packed is None and native.supports(self.up.dtype, self.up.shape[1]):
            extras = native.FFNExtras(self.gate, self.up_bias, self.down_bias, self.threshold)
            self.packed = native.PackedExpertFFN(
                self.up, self.down, self.num_experts, self.activation, extras
            )
            for name in ("up", "down", "gate", "up_bias", "down_bias"):
                weight = getattr(self, name)
                if weight is not None:
                    setattr(self, name, released(weight))

    def use_kernels(self) -> None:
        """Run the GPU's kernels for inference; on the CPU that needs Triton's interpreter."""
        self._use_kernels = True
        self._arrivals = Arrivals(self.up.device)

    def hidden(self, x_TD: Tensor) -> Tensor:
        """The activations of all neurons, [T, F]."""
        if self.packed is not None:
            return self.packed.hidden(x_TD)
        up_TF = x_TD @ self.up.T
        if self.up_bias is not None:
            up_TF = up_TF + self.up_bias
        if self.gate is None:
            return activate_reference(up_TF, self.activation, self.threshold)
        return gated_reference(x_TD @ self.gate.T, up_TF, self.activation, self.threshold)

    def mass_of(self, hidden_TF: Tensor) -> Tensor:
        """The mass of each expert, [T, E], from `hidden`."""
        return mass_of(hidden_TF, self.num_experts, gated=self.gate is not None)

    def _down(self, hidden_TF: Tensor) -> Tensor:
        y_TD = hidden_TF @ self.down
        return y_TD if self.down_bias is None else y_TD + self.down_bias

    def forward(self, x_TD: Tensor, policy: PolicyBatch, trace: Trace | None = None) -> Tensor:
        """[T, D] -> [T, D], each token by its own policy; records the choice in `trace`."""
        if policy.all_dense:
            chosen_TE = None
            y_TD = self.dense(x_TD, trace)
        elif policy.sparse_rows is None or self.packed is not None:  # which takes any mixture
            y_TD, chosen_TE = self.sparse(x_TD, policy.k_T, policy.mass_T, policy)
        else:
            y_TD, chosen_TE = self._mixed(x_TD, policy)
        if trace is not None:
            if trace.mass_every and chosen_TE is not None:
                self._record_mass(x_TD[:: trace.mass_every], trace)
            trace.add(x_TD, chosen_TE, self.num_experts)
        return y_TD

    def add_thin(
        self,
        x_1D: Tensor,
        norm: Norm,
        policy: PolicyBatch,
        arrivals: Arrivals,
        chosen_1E: Tensor | None,
    ) -> Tensor:
        """x + FFN(norm(x)) of one token on CUDA.

        Args:
            x_1D: contiguous, not normed yet.
            norm: of x.
            policy: of the token.
            arrivals: counters that no kernel of another stream uses at the same time.
            chosen_1E: where to write the choice of a sparse token; None if it is dense.
        """
        if chosen_1E is None:
            h_1F = thin_linear.thin_linear(x_1D, self.up, norm=norm, activation=self.activation)
            return torch.addmm(x_1D, h_1F, self.down)
        size = self.up.shape[0] // self.num_experts
        limits = policy.k_T, policy.mass_T, policy.max_k
        choice = choose_few(x_1D, self.router, *limits, arrivals, norm, chosen_1E)
        ids_1K = choice.ids_TK
        h_1KS = few_tokens.first_product(x_1D, self.up, ids_1K, size, self.activation, norm=norm)
        return few_tokens.second_product(h_1KS, self.down, ids_1K, arrivals, add_to=x_1D)

    def _record_mass(self, sampled_nD: Tensor, trace: Trace) -> None:
        """The true mass of every expert, which takes the whole first product."""
        hidden_nF = self.hidden(sampled_nD)
        trace.masses.append(self.mass_of(hidden_nF))
        if trace.count_fired:
            trace.fired.append((hidden_nF != 0).sum(-1))

    def _mixed(self, x_TD: Tensor, policy: PolicyBatch) -> tuple[Tensor, Tensor]:
        """Dense tokens and sparse tokens of one batch, each on its own path."""
        assert policy.dense_rows is not None
        assert policy.sparse_rows is not None
        rows = policy.sparse_rows
        if (
            self._use_kernels
            and self.is_plain
            and one_pass_is_cheaper(
                self._gpu_layer, policy.dense_rows.numel(), rows.numel(), policy.max_k
            )
        ):
            return self._masked(x_TD, policy.k_T, policy.mass_T, self.num_experts)
        sparse_nD, chosen_nE = self.sparse(
            x_TD[rows], policy.k_T[rows], policy.mass_T[rows], policy
        )
        chosen_TE = chosen_nE.new_ones((x_TD.shape[0], self.num_experts))
        chosen_TE[rows] = chosen_nE
        dense_mD = self.dense(x_TD[policy.dense_rows])
        y_TD = torch.empty_like(x_TD).index_copy(0, rows, sparse_nD)
        return y_TD.index_copy(0, policy.dense_rows, dense_mD), chosen_TE

    def dense(self, x_TD: Tensor, trace: Trace | None = None) -> Tensor:
        """Every neuron: act(x @ up.T) @ down; leaves the experts' mass in `trace` if wanted."""
        if self.packed is not None:
            return self.packed(x_TD, native.every_pair(x_TD.shape[0], self.num_experts))
        hidden_TF = self.hidden(x_TD)
        if trace is not None and trace.mass_every:
            trace.masses.append(self.mass_of(hidden_TF[:: trace.mass_every]))
        return self._down(hidden_TF)

    def sparse(
        self, x_TD: Tensor, k_T: Tensor, mass_T: Tensor, policy: PolicyBatch
    ) -> tuple[Tensor, Tensor]:
        """The chosen experts only; returns (y [T, D], chosen [T, E])."""
        if self._use_kernels:
            return self._sparse_kernels(x_TD, k_T, mass_T, policy)
        if self.packed is not None and not policy.oracle:
            chosen_TE = native.choose(x_TD, self.router, k_T, mass_T)
            return self.packed(x_TD, native.sort_pairs(chosen_TE)), chosen_TE
        scores_TE = self.scores(x_TD, oracle=policy.oracle)
        if policy.same_k is not None and self.is_plain and self._trains_with_kernels(x_TD):
            routed = training_ffn.choose_top_k(scores_TE, policy.same_k)
            y_TD = training_ffn.ffn(x_TD, self.up, self.down, routed, self.activation)
            return y_TD, routed.chosen_TE
        if policy.same_k is not None:  # the usual case, in a quarter of the operators
            best_TK = scores_TE.topk(policy.same_k, sorted=False).indices
            chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, best_TK, True)
        else:
            chosen_TE = choose_reference(scores_TE, k_T, mass_T)
        if self.packed is not None:
            return self.packed(x_TD, native.sort_pairs(chosen_TE)), chosen_TE
        if self.is_plain:
            return sparse_ffn(x_TD, self.up, self.down, chosen_TE, self.activation), chosen_TE
        size = self.up.shape[0] // self.num_experts
        chosen_TF = chosen_TE.repeat_interleave(size, dim=1)
        return self._down(self.hidden(x_TD) * chosen_TF), chosen_TE

    def _trains_with_kernels(self, x_TD: Tensor) -> bool:
        wanted = x_TD.requires_grad or self.up.requires_grad or self.down.requires_grad
        supported = training_ffn.supports(x_TD, self.num_experts)
        return torch.is_grad_enabled() and wanted and supported

    def _sparse_kernels(
        self, x_TD: Tensor, k_T: Tensor, mass_T: Tensor, policy: PolicyBatch
    ) -> tuple[Tensor, Tensor]:
        """`sparse` on CUDA: nothing here waits for the device."""
        size = self.up.shape[0] // self.num_experts
        way = cheapest_way(self._gpu_layer, x_TD.shape[0], policy.max_k, policy.quarters)
        if way in ("all_experts", "used_experts") and not self.is_plain:
            way = "many_tokens"
        if way == "all_experts":
            return self._masked(x_TD, k_T, mass_T, policy.max_k)
        choice = self._select(x_TD, k_T, mass_T, policy.max_k)
        if way == "few_tokens":
            assert self._arrivals is not None
            y_TD = few_tokens.ffn(
                x_TD,
                self.up,
                self.down,
                choice.ids_TK,
                size,
                self.activation,
                self._arrivals,
                **self._extras,
            )
        elif way == "used_experts":
            y_TD = used_experts.ffn(x_TD, self.up, self.down, choice.chosen_TE, self.activation)
        else:
            pairs = sort_pairs(choice)
            y_TD = many_tokens.ffn(x_TD, self.up, self.down, pairs, self.activation, **self._extras)
        return y_TD, choice.chosen_TE

    @property
    def _extras(self) -> dict[str, Any]:
        """What the kernels for models with gates, biases or a threshold take beside the others."""
        if self.is_plain:
            return {}
        extras = {"gate_FD": self.gate, "up_bias_F": self.up_bias, "down_bias_D": self.down_bias}
        return extras | {"threshold": self.threshold}

    def _masked(
        self, x_TD: Tensor, k_T: Tensor, mass_T: Tensor, max_k: int
    ) -> tuple[Tensor, Tensor]:
        chosen_TE, h_TF = side_by_side(
            lambda: self._select(x_TD, k_T, mass_T, max_k).chosen_TE,
            lambda: x_TD @ self.up.T,
        )
        return all_experts.activate_chosen(h_TF, chosen_TE, self.activation) @ self.down, chosen_TE

    def _select(self, x_TD: Tensor, k_T: Tensor, mass_T: Tensor, max_k: int) -> Choice:
        """The choice on CUDA, in one launch or two."""
        if x_TD.shape[0] > MOST_TOKENS:
            return choose_many(x_TD, self.router, k_T, mass_T, max_k)
        assert self._arrivals is not None
        return choose_few(x_TD, self.router, k_T, mass_T, max_k, self._arrivals)

    @property
    def _gpu_layer(self) -> FFNShape:
        neurons, width = self.up.shape
        size = neurons // self.num_experts
        return FFNShape(width, self.num_experts, size, self.up.element_size())

    def scores(self, x_TD: Tensor, *, oracle: bool = False) -> Tensor:
        """Scores [T, E] whose softmax is the (predicted or true) share of activation mass."""
        if oracle:
            mass_TE = self.mass_of(self.hidden(x_TD))
            return mass_TE.detach().float().clamp_min(1e-30).log()
        x_TD = x_TD.detach().float()
        if torch.is_autocast_enabled(x_TD.device.type):  # near ties must fall as in evaluation
            with torch.autocast(x_TD.device.type, enabled=False):
                return x_TD @ self.router.T
        return x_TD @ self.router.T
