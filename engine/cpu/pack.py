"""Packs a model for the CPU's kernels: its modules are replaced by others that compute the same.

The packed weights replace the parameters, which are released: the model can then neither be trained
nor saved. What is replaced is called as before, so `Decoder.forward` serves packed models as well.

Shapes: T tokens, D model, F neurons, E experts, K inputs, N outputs, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn

from engine.cpu import elementwise, experts, linear, native
from engine.model.attention import rotate
from engine.model.decoder import Attention, Decoder, Layer
from engine.model.experts import mass_of
from engine.model.ffn import ExpertFFN, FeedForward, choose, router_scores
from engine.model.norms import LayerNorm, Norm, RMSNorm
from engine.model.policy_batch import PolicyBatch
from engine.model.trace import Trace


def supports(model: Decoder) -> bool:
    """Whether the CPU's kernels take this model, here."""
    weight, config = model.embedding.weight, model.config
    if weight.device.type != "cpu":  # asked before `native`, whose answer may compile the kernels
        return False
    even = config.word_embed_proj_dim % 2 == 0  # the kernels read inputs in pairs
    return even and native.supports(weight.dtype, config.hidden_size, config.head_dim)


def pack(model: Decoder) -> None:
    """Pack a model that `supports` takes. Packing again changes nothing."""
    embedding: nn.Module = model.embedding
    if isinstance(embedding, PackedEmbedding | EmbeddingTable):
        return
    for name in ("project_in", "project_out", "head"):
        layer = getattr(model, name)
        if layer is not None:
            _replace(model, name, PackedLinear(layer))
    if model.head is None:  # the output layer and the embedding share one packed copy
        shared = PackedLinear(model.embedding)
        _replace(model, "head", shared)
        _replace(model, "embedding", PackedEmbedding(shared))
    else:
        _replace(model, "embedding", EmbeddingTable(model.embedding))
    if model.positions is not None:
        _replace(model, "positions", EmbeddingTable(model.positions))
    if model.norm is not None:
        _replace(model, "norm", packed_norm(model.norm))
    for layer in model.layers:
        assert isinstance(layer, Layer)
        pack_layer(layer)


def pack_layer(layer: Layer) -> None:
    """Pack one layer, for models that are worked on layer by layer."""
    for name in ("attention_norm", "ffn_norm"):
        _replace(layer, name, packed_norm(getattr(layer, name)))
    attention: Attention = layer.attention
    for name in ("qkv", "out"):
        _replace(attention, name, PackedLinear(getattr(attention, name)))
    if attention.turn is rotate:
        attention.turn = elementwise.rotate_
    _replace(layer, "ffn", PackedFFN(layer.ffn))
    if layer.multiplier != 1.0:
        # Rounded once, as in the call that runs all layers, where the next norm adds it.
        layer.sum = elementwise.add_scaled_


def _replace(module: nn.Module, name: str, child: nn.Module) -> None:
    """Put a packed module in the place of one that it can stand for."""
    setattr(module, name, child)


def released(weight: Tensor) -> nn.Parameter:
    """An empty parameter in place of one that has been packed: type and device stay known."""
    return nn.Parameter(weight.new_empty(0), requires_grad=False)


class PackedLinear(nn.Module):
    """`nn.Linear` with packed weights; of an embedding, its use as output layer: [T, K] -> [T, N].

    Attributes:
        packed: what the kernels take.
        weight: an empty parameter that tells type and device.
    """

    def __init__(self, source: nn.Linear | nn.Embedding) -> None:
        super().__init__()
        self.packed = linear.PackedLinear(source.weight, getattr(source, "bias", None))
        self.weight = source.weight = released(source.weight)

    def forward(self, x_TK: Tensor) -> Tensor:
        return self.packed(x_TK)


class PackedEmbedding(nn.Module):
    """`nn.Embedding` that reads its rows, [T] -> [T, D], from a packed output layer [V, D]."""

    def __init__(self, head: PackedLinear) -> None:
        super().__init__()
        self.weight = head.weight
        self._packed = head.packed

    def forward(self, ids_T: Tensor) -> Tensor:
        return self._packed.rows(ids_T)


class EmbeddingTable(nn.Module):
    """`nn.Embedding` with memory of its own: one that stays in a mapped file keeps all resident."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.weight = nn.Parameter(table.weight.clone(), requires_grad=False)

    def forward(self, ids_T: Tensor) -> Tensor:
        return nn.functional.embedding(ids_T, self.weight)


class PackedRMSNorm(nn.Module):
    """`RMSNorm` by the CPU's kernels; `add` replaces x in place."""

    bias = None

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        assert norm.eps is not None
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return elementwise.rms_norm(x_TD, None, self.weight, self.eps)

    def add(self, x_TD: Tensor, delta_TD: Tensor, multiplier: float = 1.0) -> tuple[Tensor, Tensor]:
        return x_TD, elementwise.rms_norm(x_TD, delta_TD, self.weight, self.eps, multiplier)


class PackedLayerNorm(nn.Module):
    """`LayerNorm` by the CPU's kernels; `add` replaces x in place."""

    def __init__(self, norm: LayerNorm) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.full_weight, requires_grad=False)
        self.bias, self.eps = norm.bias, norm.eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return elementwise.layer_norm(x_TD, None, self.weight, self.bias, self.eps)

    def add(self, x_TD: Tensor, delta_TD: Tensor, multiplier: float = 1.0) -> tuple[Tensor, Tensor]:
        weight_D, bias_D = self.weight, self.bias
        return x_TD, elementwise.layer_norm(x_TD, delta_TD, weight_D, bias_D, self.eps, multiplier)


PackedNorm = PackedRMSNorm | PackedLayerNorm


def packed_norm(norm: Norm) -> PackedNorm:
    return PackedRMSNorm(norm) if isinstance(norm, RMSNorm) else PackedLayerNorm(norm)


class PackedFFN(nn.Module, FeedForward):
    """`ExpertFFN` on the CPU's kernels, which take any mixture of policies.

    Attributes:
        packed: what the kernels take.
        up: an empty parameter that tells type and device.
    """

    router: Tensor
    forward = FeedForward.forward

    def __init__(self, ffn: ExpertFFN) -> None:
        super().__init__()
        self.num_experts, self._gated = ffn.num_experts, ffn.gate is not None
        extras = experts.FFNExtras(ffn.gate, ffn.up_bias, ffn.down_bias, ffn.threshold)
        self.packed = experts.PackedExpertFFN(
            ffn.up, ffn.down, ffn.num_experts, ffn.activation, extras
        )
        for name in ("up", "down", "gate", "up_bias", "down_bias"):
            weight = getattr(ffn, name)
            if weight is not None:
                setattr(ffn, name, released(weight))
        self.up = ffn.up
        self.register_buffer("router", ffn.router)

    def hidden(self, x_TD: Tensor) -> Tensor:
        return self.packed.hidden(x_TD)

    def mass_of(self, hidden_TF: Tensor) -> Tensor:
        return mass_of(hidden_TF, self.num_experts, gated=self._gated)

    def scores(self, x_TD: Tensor, *, oracle: bool = False) -> Tensor:
        """Scores [T, E], as `ExpertFFN.scores` computes them."""
        if oracle:
            mass_TE = self.mass_of(self.hidden(x_TD))
            return mass_TE.float().clamp_min(1e-30).log()
        return router_scores(x_TD, self.router)

    def dense(self, x_TD: Tensor, trace: Trace | None = None) -> Tensor:
        return self.packed(x_TD, experts.every_pair(x_TD.shape[0], self.num_experts))

    def sparse(self, x_TD: Tensor, policy: PolicyBatch) -> tuple[Tensor, Tensor]:
        if policy.oracle:
            chosen_TE = choose(self.scores(x_TD, oracle=True), policy)
        else:
            chosen_TE = experts.choose(x_TD, self.router, policy.k_T, policy.mass_T)
        return self.packed(x_TD, experts.sort_pairs(chosen_TE)), chosen_TE

    def mixed(self, x_TD: Tensor, policy: PolicyBatch) -> tuple[Tensor, Tensor]:
        return self.sparse(x_TD, policy)
