"""The decoder, and a naive `generate` that is the oracle of the fast engine.

Models that are trained here have RMSNorm, rotary positions, grouped-query attention, expert FFNs,
tied embeddings and no biases; `ModelConfig` says what imported models may have instead. The model
works on a flat batch of T tokens: only `attend` knows which tokens belong together, and only
`policy` knows which experts a token may use.

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
from engine.model.attention import Attend, causal_attend, rotate
from engine.model.ffn import ExpertFFN
from engine.model.norms import add_scaled, norm_of
from engine.model.policy_batch import PolicyBatch
from engine.model.rotary import rotary_tables
from engine.model.trace import Trace
from engine.policy import ExpertPolicy


class Attention(nn.Module):
    """Causal self-attention; keys and values may have fewer heads."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.turn = rotate if config.is_rotary else None
        all_heads, bias = (self.heads + 2 * self.kv_heads) * self.head_dim, config.attention_bias
        self.qkv = nn.Linear(config.hidden_size, all_heads, bias=bias)
        self.out = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=bias)

    def forward(self, x_TD: Tensor, cos_Td: Tensor, sin_Td: Tensor, attend: Attend) -> Tensor:
        heads = self.qkv(x_TD).view(x_TD.shape[0], -1, self.head_dim)
        qk_THd, v_TGd = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        if self.turn is not None:
            qk_THd = self.turn(qk_THd, cos_Td, sin_Td)
        q_THd, k_TGd = torch.split(qk_THd, [self.heads, self.kv_heads], dim=1)
        out: Tensor = self.out(attend(self.layer, q_THd, k_TGd, v_TGd).flatten(1))
        return out


class Layer(nn.Module):
    """One decoder layer: x + attention(norm(x)), then x + ffn(norm(x)).

    Models with norms after the sums compute norm(x + attention(x)), then norm(x + ffn(x)).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = norm_of(config)
        self.attention = Attention(config, layer)
        self.ffn_norm = norm_of(config)
        self.ffn = ExpertFFN(config)
        self.norm_first = config.do_layer_norm_before
        self.multiplier = config.residual_multiplier
        self.sum = add_scaled  # x, what is added to it, and the multiplier of that

    def forward(
        self,
        x_TD: Tensor,
        cos_Td: Tensor,
        sin_Td: Tensor,
        attend: Attend,
        policy: PolicyBatch,
        trace: Trace | None,
    ) -> Tensor:
        return self.around(
            x_TD,
            lambda x: self.attention(x, cos_Td, sin_Td, attend),
            lambda x: self.ffn(x, policy, trace),
        )

    def around(
        self,
        x_TD: Tensor,
        attention: Callable[[Tensor], Tensor],
        ffn: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The layer around its attention and its FFN."""
        if not self.norm_first:
            _, x_TD = self.attention_norm.add(x_TD, attention(x_TD), self.multiplier)
            return self.ffn_norm.add(x_TD, ffn(x_TD), self.multiplier)[1]
        attended_TD = attention(self.attention_norm(x_TD))
        x_TD, normed_TD = self.ffn_norm.add(x_TD, attended_TD, self.multiplier)
        return self.sum(x_TD, ffn(normed_TD), self.multiplier)


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
        self.project_in = nn.Linear(width, inner, bias=False) if width != inner else None
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = norm_of(config) if config.do_layer_norm_before else None
        self.project_out = nn.Linear(inner, width, bias=False) if width != inner else None
        self.head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.head = nn.Linear(width, config.vocab_size, bias=False)
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
        cos_Td, sin_Td = self.turns(positions_T)
        for layer in self.layers:
            x_TD = layer(x_TD, cos_Td, sin_Td, attend, policy, trace)
        return self.logits_of(self.last_norm(x_TD if rows is None else x_TD[rows]))

    def embed(self, ids_T: Tensor, positions_T: Tensor | None) -> Tensor:
        """What the first layer takes, [T, D]; rotary models need no positions here."""
        config = self.config
        x_TD: Tensor = self.embedding(ids_T)
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
        if self.head is None:
            return F.linear(x_TD, self.embedding.weight).float()
        logits_TV: Tensor = self.head(x_TD)
        return logits_TV.float()

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
