"""The decoder, and a naive `generate` that is the oracle of the fast engine.

What is trained here has RMSNorm, rotary positions, grouped-query attention, expert FFNs, tied
embeddings and no biases; `ModelConfig` says what imported models may have instead. The model works
on a flat batch of T tokens: which tokens belong together is known to `attend` alone,
and which experts a token may use to `policy` alone.

Shapes: T tokens, D model, V vocabulary, H query heads, G key-value heads, d head dimension,
B sequences, L length.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.cpu import native
from engine.cpu.attention import NativeAttend
from engine.cpu.layers import LayerParts, LayerShape, Limits, PackedLayers
from engine.model.attention import Attend, causal_attend, rotate
from engine.model.experts import released
from engine.model.ffn import ExpertFFN
from engine.model.norms import Norm, add_scaled, norm_of
from engine.model.policy_batch import PolicyBatch
from engine.model.rotary import rotary_tables
from engine.model.trace import Trace
from engine.policy import ExpertPolicy


class Linear(nn.Linear):
    """A linear layer that `prepare` packs for inference on the CPU."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.packed: native.PackedLinear | None = None

    def prepare(self) -> None:
        if self.packed is None:
            self.packed = native.PackedLinear(self.weight, self.bias)
            self.weight = released(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.packed(x) if self.packed is not None else super().forward(x)


class Attention(nn.Module):
    """Causal self-attention; keys and values may have fewer heads."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.rotary = config.is_rotary
        all_heads, bias = (self.heads + 2 * self.kv_heads) * self.head_dim, config.attention_bias
        self.qkv = Linear(config.hidden_size, all_heads, bias=bias)
        self.out = Linear(self.heads * self.head_dim, config.hidden_size, bias=bias)
        self._prepared = False

    def prepare(self) -> None:
        self._prepared = True

    def forward(self, x_TD: Tensor, cos_Td: Tensor, sin_Td: Tensor, attend: Attend) -> Tensor:
        heads = self.qkv(x_TD).view(x_TD.shape[0], -1, self.head_dim)
        qk_THd, v_TGd = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        if self.rotary:
            turn = native.rotate_ if self._prepared else rotate
            qk_THd = turn(qk_THd, cos_Td, sin_Td)
        q_THd, k_TGd = torch.split(qk_THd, [self.heads, self.kv_heads], dim=1)
        out: Tensor = self.out(attend(self.layer, q_THd, k_TGd, v_TGd).flatten(1))
        return out


class Layer(nn.Module):
    """One decoder layer: x + attention(norm(x)), then x + ffn(norm(x)).

    Or, with norms after, norm(x + attention(x)), then norm(x + ffn(x)).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = norm_of(config)
        self.attention = Attention(config, layer)
        self.ffn_norm = norm_of(config)
        self.ffn = ExpertFFN(config)
        self.norm_first = config.do_layer_norm_before
        self.multiplier = config.residual_multiplier

    def forward(
        self,
        x_TD: Tensor,
        cos_Td: Tensor,
        sin_Td: Tensor,
        attend: Attend,
        policy: PolicyBatch,
        trace: Trace | None,
    ) -> Tensor:
        return self.around(x_TD, lambda x: self.attention(x, cos_Td, sin_Td, attend), policy, trace)

    def around(
        self,
        x_TD: Tensor,
        attention: Callable[[Tensor], Tensor],
        policy: PolicyBatch,
        trace: Trace | None,
    ) -> Tensor:
        """The layer around its attention."""
        if not self.norm_first:
            _, x_TD = self.attention_norm.add(x_TD, attention(x_TD), self.multiplier)
            return self.ffn_norm.add(x_TD, self.ffn(x_TD, policy, trace), self.multiplier)[1]
        attended_TD = attention(self.attention_norm(x_TD))
        x_TD, normed_TD = self.ffn_norm.add(x_TD, attended_TD, self.multiplier)
        delta_TD = self.ffn(normed_TD, policy, trace)
        if self.multiplier != 1.0 and self.ffn.packed is not None:
            # As the next norm adds it where one call runs all layers: rounded once.
            return native.add_scaled_(x_TD, delta_TD, self.multiplier)
        return add_scaled(x_TD, delta_TD, self.multiplier)


class Decoder(nn.Module):
    """The language model. One set of weights; `policy` decides dense or sparse per token."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, inner = config.word_embed_proj_dim, config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.positions: nn.Embedding | None = None
        if not config.is_rotary:
            rows = config.max_position_embeddings + config.position_offset
            self.positions = nn.Embedding(rows, inner)
        self.project_in = Linear(width, inner) if width != inner else None
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = norm_of(config) if config.do_layer_norm_before else None
        self.project_out = Linear(inner, width) if width != inner else None
        self.head = None if config.tie_word_embeddings else Linear(width, config.vocab_size)
        # As those that are trained here, which have GPU kernels for whole steps.
        self.is_plain = self._plain()
        self._packed_embedding: native.PackedLinear | None = None
        self._packed_layers: PackedLayers | None = None
        self.materialize_tables(self.embedding.weight.device)

    def materialize_tables(self, device: torch.device | str) -> None:
        """(Re)compute the rotary tables; they are derived, so no checkpoint holds them."""
        cos, sin = rotary_tables(self.config)
        self.register_buffer("cos", cos.to(device), persistent=False)
        self.register_buffer("sin", sin.to(device), persistent=False)

    def turns(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of each position, float32 [T, d / 2] each."""
        return self.cos[positions_T], self.sin[positions_T]

    def initialize(self, generator: torch.Generator) -> None:
        """Fresh weights: normal, with residual outputs scaled by 1/sqrt(2 * layers) (GPT-2)."""
        std = self.config.initializer_range
        residual = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 1:
                nn.init.constant_(parameter, 0.0 if self.config.norm == "layernorm1p" else 1.0)
            else:
                into_residual = name.endswith(("attention.out.weight", "ffn.down"))
                scale = residual if into_residual else std
                nn.init.normal_(parameter, std=scale, generator=generator)

    def ffns(self) -> list[ExpertFFN]:
        """The expert FFN of each layer, in order."""
        return [layer.ffn for layer in self.layers if isinstance(layer, Layer)]

    def prepare(self) -> None:
        """Switch to the inference form: packed weights on the CPU, Triton kernels on CUDA.

        On the CPU the packed weights replace the parameters, which are released: the model can
        neither be trained nor saved afterwards. Where the kernels do not support its type or shape,
        it stays as it is and runs on torch's operators. Preparing again changes nothing.
        """
        if self.embedding.weight.is_cuda:
            for ffn in self.ffns():
                ffn.prepare()
        elif self._packed_layers is None and self.runs_natively:
            if self.head is None:
                self._packed_embedding = native.PackedLinear(self.embedding.weight)
                self.embedding.weight = released(self.embedding.weight)
            for table in (self.embedding, self.positions):
                if table is not None:  # what stays in a mapped file keeps all of it resident
                    table.weight = nn.Parameter(table.weight.clone(), requires_grad=False)
            for module in self.modules():
                if isinstance(module, Linear | Norm | Attention | ExpertFFN):
                    module.prepare()
            self._packed_layers = self._pack_layers()

    @property
    def runs_natively(self) -> bool:
        """Whether the CPU's kernels support this model, here."""
        weight, config = self.embedding.weight, self.config
        if weight.device.type != "cpu":  # asked first: the answer below may compile them
            return False
        even = config.word_embed_proj_dim % 2 == 0  # inputs come in pairs
        return even and native.supports(weight.dtype, config.hidden_size, config.head_dim)

    def _plain(self) -> bool:
        config = self.config
        scales = config.embedding_multiplier, config.residual_multiplier, config.logits_scaling
        return (
            config.norm == "rmsnorm"
            and config.do_layer_norm_before
            and config.is_rotary
            and not config.attention_bias
            and self.head is None
            and self.project_in is None
            and scales == (1.0, 1.0, 1.0)
            and all(ffn.is_plain for ffn in self.ffns())
        )

    def forward(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        policy: PolicyBatch,
        trace: Trace | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Logits [T, V] in float32, or [len(rows), V] of the given rows of the batch alone."""
        x_TD = self.embed(ids_T, positions_T)
        if isinstance(attend, NativeAttend) and self._runs_whole(policy, trace):
            x_TD = self._run_whole(x_TD, positions_T, attend, policy, trace, rows)
        else:
            cos_Td, sin_Td = self.turns(positions_T)
            for layer in self.layers:
                x_TD = layer(x_TD, cos_Td, sin_Td, attend, policy, trace)
            x_TD = self.last_norm(x_TD if rows is None else x_TD[rows])
        return self.logits_of(x_TD)

    def embed(self, ids_T: Tensor, positions_T: Tensor | None) -> Tensor:
        """What the first layer takes, [T, D]; rotary models need no positions here."""
        packed, config = self._packed_embedding, self.config
        x_TD: Tensor = self.embedding(ids_T) if packed is None else packed.rows(ids_T)
        if config.embedding_multiplier != 1.0:
            x_TD = x_TD * config.embedding_multiplier
        if self.project_in is not None:
            x_TD = self.project_in(x_TD)
        if self.positions is not None:
            assert positions_T is not None
            x_TD = x_TD + self.positions(positions_T + config.position_offset)
        return x_TD

    def last_norm(self, x_TD: Tensor) -> Tensor:
        return x_TD if self.norm is None else self.norm(x_TD)

    def logits_of(self, x_TD: Tensor) -> Tensor:
        """Logits [T, V] in float32 of what the last layer and norm gave."""
        if self.project_out is not None:
            x_TD = self.project_out(x_TD)
        if self.config.logits_scaling != 1.0:
            x_TD = x_TD / self.config.logits_scaling
        logits_TV: Tensor
        if self.head is not None:
            logits_TV = self.head(x_TD)
        elif self._packed_embedding is not None:
            logits_TV = self._packed_embedding(x_TD)
        else:
            logits_TV = F.linear(x_TD, self.embedding.weight)
        return logits_TV.float()

    def _pack_layers(self) -> PackedLayers:
        config = self.config
        parts = []
        for layer in self.layers:
            assert isinstance(layer, Layer)
            qkv, out, ffn = layer.attention.qkv.packed, layer.attention.out.packed, layer.ffn.packed
            assert qkv is not None
            assert out is not None
            assert ffn is not None
            first, second = layer.attention_norm, layer.ffn_norm
            norms = (first.weight, first.bias), (second.weight, second.bias)
            parts.append(LayerParts(norms[0], qkv, out, norms[1], ffn))
        shape = LayerShape(
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.rms_norm_eps,
            config.residual_multiplier,
            config.window,
            config.do_layer_norm_before,
        )
        return PackedLayers(parts, shape)

    def _runs_whole(self, policy: PolicyBatch, trace: Trace | None) -> bool:
        """Whether one call may run all layers: it chooses by the router and keeps choices alone."""
        kept = trace is not None and (trace.keep_inputs or trace.mass_every)
        return self._packed_layers is not None and not policy.oracle and not kept

    def _run_whole(
        self,
        x_TD: Tensor,
        positions_T: Tensor,
        attend: NativeAttend,
        policy: PolicyBatch,
        trace: Trace | None,
        rows: Tensor | None,
    ) -> Tensor:
        """All layers and the last norm, on the CPU's kernels."""
        assert self._packed_layers is not None
        limits = None
        if not policy.all_dense:
            experts = self.config.experts.num_experts
            most = policy.max_k if policy.dense_rows is None else experts
            limits = Limits(policy.k_T, policy.mass_T, policy.shared_T, most)
        routers = [ffn.router for ffn in self.ffns()]
        x_TD = x_TD.contiguous()
        turns = self.turns(positions_T) if self.config.is_rotary else None
        delta_TD, chosen_LTE = self._packed_layers(x_TD, turns, attend.sequences, routers, limits)
        if trace is not None:
            for layer in range(len(routers)):
                chosen_TE = None if chosen_LTE is None else chosen_LTE[layer]
                trace.add(x_TD, chosen_TE, self.config.experts.num_experts)
        if rows is not None:
            x_TD, delta_TD = x_TD[rows], delta_TD[rows]
        if self.norm is None:
            return x_TD
        return self.norm.add(x_TD, delta_TD, self.config.residual_multiplier)[1]

    def logits(self, ids_BL: Tensor, policy: ExpertPolicy, trace: Trace | None = None) -> Tensor:
        """Logits [B, L, V] of whole sequences under one policy."""
        batch, length = ids_BL.shape
        positions_T = torch.arange(length, device=ids_BL.device).repeat(batch)
        policies = PolicyBatch.uniform(
            policy, ids_BL.numel(), self.config.experts.num_experts, ids_BL.device
        )
        attend = causal_attend(batch, length, self.config.window)
        logits_TV: Tensor = self(ids_BL.flatten(), positions_T, attend, policies, trace)
        return logits_TV.view(batch, length, -1)


@torch.inference_mode()
def generate(
    model: Decoder, prompt_ids: list[int], max_new_tokens: int, policy: ExpertPolicy
) -> list[int]:
    """Greedy continuation, recomputing the whole sequence for every token.

    Slow and obviously right: the engine's output is tested against it. Stops after the model's
    end-of-text token, which is included.
    """
    ids = list(prompt_ids)
    for _ in range(max_new_tokens):
        logits_1LV = model.logits(torch.tensor([ids]), policy)
        ids.append(int(logits_1LV[0, -1].argmax()))
        if ids[-1] == model.config.eos_token_id:
            break
    return ids[len(prompt_ids) :]
