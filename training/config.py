"""What a training run is: model shape, data, optimiser, switching. Frozen, checked when made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from engine.config import ExpertConfig, ModelConfig, check_choice, check_range
from engine.errors import require

SCHEDULES: Final = ("cosine", "wsd")
MODES: Final = ("ssd", "dense", "static")
PRECISIONS: Final = ("float32", "bfloat16")
PARALLEL: Final = ("ddp", "fsdp")


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
    """AdamW and its learning rate over the run (`training.experts.optimizer.learning_rate`).

    Attributes:
        schedule: `cosine`: warm-up, then half a cosine down to the floor; `wsd`: warm-up, stable at
            the peak, then linear decay to the floor.
        min_lr_share: the floor, as a share of the peak `learning_rate`.
        warmup_share: share of the run in which the rate rises linearly.
        decay_share: share of the run in which `wsd` decays, at most what follows the warm-up.
    """

    learning_rate: float = 2e-3
    schedule: str = "cosine"
    min_lr_share: float = 0.05
    warmup_share: float = 0.05
    decay_share: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        check_range("optimizer.learning_rate", self.learning_rate, 1e-8, 1.0)
        check_choice("optimizer.schedule", self.schedule, SCHEDULES)
        check_range("optimizer.min_lr_share", self.min_lr_share, 0.0, 1.0)
        check_range("optimizer.warmup_share", self.warmup_share, 0.0, 0.5)
        check_range("optimizer.decay_share", self.decay_share, 0.0, 1.0)
        check_range("optimizer.beta1", self.beta1, 0.0, 0.9999)
        check_range("optimizer.beta2", self.beta2, 0.0, 0.99999)
        check_range("optimizer.weight_decay", self.weight_decay, 0.0, 1.0)
        check_range("optimizer.grad_clip", self.grad_clip, 1e-3, 1e3)


@dataclass(frozen=True)
class SwitchConfig:
    """When training goes dense, sparse or mixed, and what a sparse step does.

    Shares are of the run's steps. Similarities are overlaps of active-neuron sets on the probe
    batch (`training.experts.activation.similarity`).

    Attributes:
        mode: `ssd`; `dense`: every step dense, clustered when it ends; `static`: one clustering
            when the first dense phase ends, then sparse steps to the end.
        probe_share: how far two looks at the activations lie apart.
        settled: dense -> sparse when two consecutive probes are at least this similar.
        stale: sparse -> dense when a probe is less similar than this to the clustering's birth.
        min_dense_share, max_dense_share: bounds on a dense phase.
        min_sparse_share, max_sparse_share: bounds on a sparse phase.
        mixed_share: length of the last phase, in which dense and sparse steps alternate.
        top_k: experts per token in sparse phases: one after another, each for an equal stretch
            between the first sparse step and the mixed phase.
        mixed_top_k: experts per token of the mixed phase's sparse steps, in turn.
        mixed_dense_every: every n-th step of the mixed phase is dense.
        penalty: weight of the share of true activation mass outside the chosen experts.
        dense_penalty: the same in dense steps, outside the last of `top_k`'s experts; not in mode
            `dense`, which is plain training.
        penalty_tokens: share of a step's tokens on which the penalty is measured, rounded to every
            n-th token.
    """

    mode: str = "ssd"
    probe_share: float = 0.02
    settled: float = 0.85
    stale: float = 0.7
    min_dense_share: float = 0.1
    max_dense_share: float = 0.25
    min_sparse_share: float = 0.1
    max_sparse_share: float = 0.6
    mixed_share: float = 0.45
    top_k: tuple[int, ...] = (16, 8)
    mixed_top_k: tuple[int, ...] = (4, 8)
    mixed_dense_every: int = 2
    penalty: float = 0.3
    dense_penalty: float = 0.03
    penalty_tokens: float = 0.125

    def __post_init__(self) -> None:
        check_choice("switch.mode", self.mode, MODES)
        for name in ("probe_share", "min_dense_share", "max_dense_share"):
            check_range(f"switch.{name}", getattr(self, name), 1e-4, 1.0)
        for name in ("min_sparse_share", "max_sparse_share", "penalty_tokens"):
            check_range(f"switch.{name}", getattr(self, name), 1e-4, 1.0)
        for name in ("settled", "stale", "mixed_share"):
            check_range(f"switch.{name}", getattr(self, name), 0.0, 1.0)
        for name in ("penalty", "dense_penalty"):
            check_range(f"switch.{name}", getattr(self, name), 0.0, 100.0)
        check_range("switch.mixed_dense_every", self.mixed_dense_every, 2, 1000)
        require(
            self.min_dense_share <= self.max_dense_share,
            "switch.min_dense_share must not exceed switch.max_dense_share",
        )
        require(
            self.min_sparse_share <= self.max_sparse_share,
            "switch.min_sparse_share must not exceed switch.max_sparse_share",
        )
        for name in ("top_k", "mixed_top_k"):
            require(len(getattr(self, name)) > 0, f"switch.{name} must name at least one k")

    @property
    def dense_weight(self) -> float:
        """The penalty's weight in dense steps."""
        return 0.0 if self.mode == "dense" else self.dense_penalty

    @property
    def penalty_every(self) -> int:
        """The penalty is measured on every n-th token."""
        return max(1, round(1 / self.penalty_tokens))


@dataclass(frozen=True)
class TrainConfig:
    """One training run, complete.

    Attributes:
        preset: the name it started from, for the record.
        steps: optimiser steps.
        batch_size: sequences per step, over all processes.
        micro_batch_size: sequences per forward pass of one process; their gradients are summed
            until its part of the batch is done. 0: the whole part at once.
        sequence_length: tokens per sequence, and the model's maximum.
        seed: decides the first weights, the order of the data and the clustering.
        valid_share: share of the corpus (by characters) held out.
        validate_share: share of the steps between two looks at held-out text; 0: at the end alone.
        validate_tokens: how many tokens such a look reads.
        evaluate_tokens: how many held-out tokens the finished model is scored on at most.
        checkpoint_share: share of the steps between two saved training states.
        keep_states: training states kept, the latest ones.
        precision: how products are computed in training; with `bfloat16` by autocast, while the
            weights stay float32.
        parallel: how several processes share the work: `ddp`, each with all weights, or `fsdp`,
            each with its part of them.
        dtype: the type that the weights are saved in.
        start: what identifies the model that the run goes on from (`training.importing.start`), if
            there is one; `model` then says its sizes.
    """

    preset: str = "starter"
    steps: int = 1000
    batch_size: int = 8
    micro_batch_size: int = 0
    sequence_length: int = 512
    seed: int = 1
    valid_share: float = 0.03
    validate_share: float = 0.1
    validate_tokens: int = 16384
    evaluate_tokens: int = 1 << 17
    checkpoint_share: float = 0.05
    keep_states: int = 1
    precision: str = "float32"
    parallel: str = "ddp"
    dtype: str = "bfloat16"
    start: str = ""
    model: ModelShape = field(default_factory=ModelShape)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    switch: SwitchConfig = field(default_factory=SwitchConfig)

    def __post_init__(self) -> None:
        check_range("steps", self.steps, 1, 1 << 30)
        check_range("batch_size", self.batch_size, 1, 1 << 16)
        check_range("micro_batch_size", self.micro_batch_size, 0, self.batch_size)
        check_range("sequence_length", self.sequence_length, 2, 1 << 20)
        check_range("seed", self.seed, 0, (1 << 31) - 1)
        check_range("valid_share", self.valid_share, 0.001, 0.5)
        check_range("validate_share", self.validate_share, 0.0, 1.0)
        check_range("validate_tokens", self.validate_tokens, 1, 1 << 30)
        check_range("evaluate_tokens", self.evaluate_tokens, 1, 1 << 30)
        check_range("checkpoint_share", self.checkpoint_share, 1e-4, 1.0)
        check_range("keep_states", self.keep_states, 1, 1000)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("parallel", self.parallel, PARALLEL)
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        if not self.start:
            self.model.model_config(self.sequence_length, 0, self.dtype)  # checks the whole shape
        for k in (*self.switch.top_k, *self.switch.mixed_top_k):
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
        values = dataclasses.asdict(self)
        # Runs that were started before a field came or went keep their digest, and so resume.
        if not self.start:
            del values["start"]
        values["switch"] |= {key: gone.only for key, gone in REMOVED_FROM_SWITCH.items()}
        text = json.dumps(values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class RemovedSetting:
    """A key of the table `switch` that earlier versions had.

    What it did lost against what stayed; docs/log.md has the measurements. Older files and run
    directories name it too, mostly with the value that still describes what training does: that
    value is accepted and dropped.

    Attributes:
        only: the value that describes what training does today.
        gone: the value that was removed.
        name: what that value stood for.
    """

    only: str
    gone: str
    name: str


REMOVED_FROM_SWITCH: Final = {
    "clustering": RemovedSetting("weights", "coactivation", "clustering by co-activation"),
    "router": RemovedSetting("centroid", "learned", "a router that learns while the model trains"),
}


def removed_sentence(key: str) -> str:
    """What a user reads who asks for the value of `switch.KEY` that is gone."""
    setting = REMOVED_FROM_SWITCH[key]
    return (
        f'switch.{key} = "{setting.gone}" ({setting.name}) was removed, because it made models no '
        f'better (docs/log.md); leave switch.{key} out to train with "{setting.only}"'
    )


def without_removed(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The nested `values` of a configuration without the settings that were removed.

    Raises:
        ConfigError: if one of them has another value than the one that stayed.
    """
    switch = values.get("switch")
    if not isinstance(switch, dict):
        return dict(values)
    for key, setting in REMOVED_FROM_SWITCH.items():
        found = switch.get(key, setting.only)
        require(found != setting.gone, f"{where}: {removed_sentence(key)}")
        require(
            found == setting.only,
            f'{where}: switch.{key} can only be "{setting.only}"; leave it out',
        )
    return {**values, "switch": {k: v for k, v in switch.items() if k not in REMOVED_FROM_SWITCH}}


def used_by(config: Mapping[str, Any]) -> str | None:
    """The sentence for a run whose RUN/config.json is `config`, if it used what was removed."""
    switch = config.get("switch")
    for key, setting in REMOVED_FROM_SWITCH.items():
        if isinstance(switch, dict) and switch.get(key) == setting.gone:
            return removed_sentence(key)
    return None
