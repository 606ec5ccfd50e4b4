"""What a training run is: model shape, data, optimiser, switching. Presets are complete configs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Final

from engine.config import ExpertConfig, ModelConfig, check_choice, check_range
from engine.errors import require


@dataclass(frozen=True)
class ModelShape:
    """The decoder to train; see `engine.config.ModelConfig` for the names."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 1024
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    num_experts: int = 64
    hidden_act: str = "relu"

    def __post_init__(self) -> None:
        check_range("model.num_experts", self.num_experts, 2, self.intermediate_size)
        require(
            self.intermediate_size % self.num_experts == 0,
            f"model.num_experts {self.num_experts} must divide model.intermediate_size "
            f"{self.intermediate_size}",
        )

    def model_config(self, sequence_length: int, eos_token_id: int, dtype: str) -> ModelConfig:
        """The engine's configuration of this shape."""
        fields = dataclasses.asdict(self)
        num_experts = fields.pop("num_experts")
        experts = ExpertConfig(num_experts, self.intermediate_size // num_experts)
        return ModelConfig(
            **fields,
            experts=experts,
            max_position_embeddings=sequence_length,
            torch_dtype=dtype,
            bos_token_id=eos_token_id,
            eos_token_id=eos_token_id,
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to `min_lr_share` of the peak."""

    learning_rate: float = 2e-3
    min_lr_share: float = 0.05
    warmup_share: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        check_range("optimizer.learning_rate", self.learning_rate, 1e-8, 1.0)
        check_range("optimizer.min_lr_share", self.min_lr_share, 0.0, 1.0)
        check_range("optimizer.warmup_share", self.warmup_share, 0.0, 0.5)
        check_range("optimizer.beta1", self.beta1, 0.0, 0.9999)
        check_range("optimizer.beta2", self.beta2, 0.0, 0.99999)
        check_range("optimizer.weight_decay", self.weight_decay, 0.0, 1.0)
        check_range("optimizer.grad_clip", self.grad_clip, 1e-3, 1e3)


@dataclass(frozen=True)
class SwitchConfig:
    """When training goes dense, sparse or mixed, and what a sparse step does.

    Shares are of the run's steps. Similarities are overlaps of active-neuron sets on the probe
    batch (`training.activation.similarity`).

    Attributes:
        probe_share: between two looks at the activations.
        settled: dense -> sparse when two consecutive probes are at least this similar.
        stale: sparse -> dense when a probe is less similar than this to the clustering's birth.
        min_dense_share, max_dense_share: bounds on a dense phase.
        min_sparse_share, max_sparse_share: bounds on a sparse phase.
        mixed_share: the last phase, dense and sparse steps in turn.
        top_k: experts per token in sparse phases.
        mixed_top_k: experts per token of the mixed phase's sparse steps, in turn.
        penalty: weight of the share of true activation mass outside the chosen experts.
        penalty_tokens: share of a sparse step's tokens on which the penalty is measured, rounded
            to every n-th token.
    """

    probe_share: float = 0.02
    settled: float = 0.7
    stale: float = 0.7
    min_dense_share: float = 0.1
    max_dense_share: float = 0.3
    min_sparse_share: float = 0.1
    max_sparse_share: float = 0.25
    mixed_share: float = 0.2
    top_k: int = 8
    mixed_top_k: tuple[int, ...] = (4, 8, 12, 16)
    penalty: float = 0.3
    penalty_tokens: float = 0.25

    def __post_init__(self) -> None:
        for name in ("probe_share", "min_dense_share", "max_dense_share"):
            check_range(f"switch.{name}", getattr(self, name), 1e-4, 1.0)
        for name in ("min_sparse_share", "max_sparse_share", "penalty_tokens"):
            check_range(f"switch.{name}", getattr(self, name), 1e-4, 1.0)
        for name in ("settled", "stale", "mixed_share"):
            check_range(f"switch.{name}", getattr(self, name), 0.0, 1.0)
        check_range("switch.penalty", self.penalty, 0.0, 100.0)
        require(
            self.min_dense_share <= self.max_dense_share,
            "switch.min_dense_share must not exceed switch.max_dense_share",
        )
        require(
            self.min_sparse_share <= self.max_sparse_share,
            "switch.min_sparse_share must not exceed switch.max_sparse_share",
        )
        require(len(self.mixed_top_k) > 0, "switch.mixed_top_k must name at least one k")


@dataclass(frozen=True)
class TrainConfig:
    """One training run, complete.

    Attributes:
        preset: the name it started from, for the record.
        steps: optimiser steps.
        batch_size: sequences per step.
        sequence_length: tokens per sequence, and the model's maximum.
        seed: of weights, data order, tokenizer-independent choices and clustering.
        valid_share: share of the corpus (by characters) held out.
        checkpoint_share: share of the steps between two saved training states.
        dtype: of the saved weights; training itself is float32.
    """

    preset: str = "starter"
    steps: int = 1000
    batch_size: int = 8
    sequence_length: int = 512
    seed: int = 1
    valid_share: float = 0.03
    checkpoint_share: float = 0.05
    dtype: str = "bfloat16"
    model: ModelShape = field(default_factory=ModelShape)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    switch: SwitchConfig = field(default_factory=SwitchConfig)

    def __post_init__(self) -> None:
        check_range("steps", self.steps, 1, 1 << 30)
        check_range("batch_size", self.batch_size, 1, 1 << 16)
        check_range("sequence_length", self.sequence_length, 2, 1 << 20)
        check_range("seed", self.seed, 0, (1 << 31) - 1)
        check_range("valid_share", self.valid_share, 0.001, 0.5)
        check_range("checkpoint_share", self.checkpoint_share, 1e-4, 1.0)
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        for k in (self.switch.top_k, *self.switch.mixed_top_k):
            check_range("switch.top_k and switch.mixed_top_k", k, 1, self.model.num_experts - 1)

    @property
    def batch_tokens(self) -> int:
        return self.batch_size * self.sequence_length

    def steps_of(self, share: float) -> int:
        """A share of the run in steps, at least one."""
        return max(1, round(share * self.steps))

    @property
    def digest(self) -> str:
        """Identifies the configuration: a run resumes only under the same one."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


PRESETS: Final[dict[str, TrainConfig]] = {
    # The packaged model: 37 minutes on two CPU cores, 8 MB in bfloat16.
    "starter": TrainConfig(),
    # Seconds on any machine; to see the whole path work, not to get a model.
    "smoke": TrainConfig(
        preset="smoke",
        steps=40,
        batch_size=4,
        sequence_length=64,
        model=ModelShape(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=16,
        ),
        switch=SwitchConfig(top_k=4, mixed_top_k=(2, 4, 6)),
    ),
}
