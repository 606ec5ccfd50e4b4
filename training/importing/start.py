"""A model that training goes on from, and turning a smooth activation into ReLU.

With exact zeros a neuron can be left out; GELU and SiLU have none. `--relufy` keeps all weights of
such a model, puts ReLU in its place, and lets a short training repair what that breaks (Mirzadeh et
al., *ReLU Strikes Back*, 2023). What it broke and what was repaired is measured on held-out text:
with the smooth activation, with ReLU at once, and at the end.

Shapes: T tokens, F neurons.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from engine.checkpoint import load_tensors, read_json, verify_manifest
from engine.config import ExpertConfig, ModelConfig
from engine.errors import require
from engine.model.decoder import Decoder
from engine.model.ffn import ExpertFFN
from engine.policy import ExpertPolicy
from engine.text.tokenizer import Tokenizer
from training.config import ModelShape, OptimizerConfig, SwitchConfig, TrainConfig
from training.data.batches import Batches
from training.data.shards import tokenizer_sha256
from training.errors import DataError
from training.importing.formats.reader import Source
from training.importing.formats.smooth import SMOOTH
from training.importing.formats.source import fingerprint, open_source, read_tokenizer
from training.importing.options import choose_experts
from training.quality.evaluation import evaluate

_LENGTH: Final = 512


@dataclass(frozen=True)
class Start:
    """A model as training takes it up.

    Attributes:
        path: where it came from.
        config: its shape, with experts.
        tensors: its weights, routers aside, float32; empty after `load_into`.
        tokenizer: its own; the run's text is encoded with it.
        identity: tells this model from others.
        smooth: the activation that ReLU replaces; "" if none is replaced.
        texts: files to keep beside the model, by name: its chat template, what export needs.
    """

    path: Path
    config: ModelConfig
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer
    identity: str
    smooth: str = ""
    texts: Mapping[str, str] = field(default_factory=dict)

    def base(self) -> TrainConfig:
        """The configuration of a short run that goes on from this model.

        The shares of the experts are those of the presets. A model whose activation is replaced
        trains dense, and is clustered at the end.
        """
        experts = self.config.experts.num_experts
        eighth, sixteenth = max(1, experts // 8), max(1, experts // 16)
        return TrainConfig(
            preset="continued",
            steps=600,
            batch_size=8,
            sequence_length=min(self.config.max_position_embeddings, _LENGTH),
            evaluate_tokens=1 << 15,
            model=self._shape(),
            optimizer=OptimizerConfig(learning_rate=5e-4),
            switch=SwitchConfig(
                mode="dense" if self.smooth else "ssd",
                top_k=(max(1, experts // 4), eighth),
                mixed_top_k=(sixteenth, eighth),
            ),
            start=self.identity,
        )

    def fitted(self, config: TrainConfig) -> TrainConfig:
        """`config`, of a preset or a file, for this model: its sizes, and sequences that it takes.

        Raises:
            ConfigError: if it asks for more experts a token than the model has.
        """
        length = min(config.sequence_length, self.config.max_position_embeddings)
        return dataclasses.replace(
            config, model=self._shape(), sequence_length=length, start=self.identity
        )

    def _shape(self) -> ModelShape:
        config = self.config
        return ModelShape(
            config.vocab_size,
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.experts.num_experts,
            config.hidden_act,
        )

    def model_config(self, config: TrainConfig) -> ModelConfig:
        """The shape that the run's model has."""
        require(
            config.sequence_length <= self.config.max_position_embeddings,
            f"sequence_length {config.sequence_length} is more than the "
            f"{self.config.max_position_embeddings} tokens that {self.path} takes",
        )
        require(
            config.model == self._shape(),
            f"model: --from {self.path} decides it, nothing there can be set",
        )
        return dataclasses.replace(self.config, torch_dtype=config.dtype)

    def check_tokenizer(self, tokenizer: Tokenizer, where: str) -> None:
        """Raise DataError unless the run's tokens were made with this model's tokenizer."""
        require(
            tokenizer_sha256(tokenizer) == tokenizer_sha256(self.tokenizer),
            f"{where}: was prepared with another tokenizer than that of {self.path}; prepare it "
            f"with --tokenizer {self.path}",
            DataError,
        )

    def load_into(self, model: Decoder) -> None:
        """Give a model of that shape these weights, once: they are freed."""
        missing = model.load_state_dict(self.tensors, strict=False).missing_keys
        assert all(name.endswith("ffn.router") for name in missing), missing
        self.tensors.clear()  # the run keeps its start, but needs no second copy of the model

    def measure(self, model: Decoder, batches: Batches) -> dict[str, Any]:
        """Perplexity of `model`, which has these weights, before anything is trained.

        `before`: as it was made; `swapped`: with ReLU, where that replaces the activation.
        """
        swapped = evaluate(model, batches, ExpertPolicy.dense()).perplexity
        if not self.smooth:
            return {"source": self.path.resolve().name, "before": swapped}
        for ffn in model.ffns():
            ffn.hidden = partial(_smooth_hidden, ffn, SMOOTH[self.smooth])  # type: ignore[method-assign]
        try:
            before = evaluate(model, batches, ExpertPolicy.dense()).perplexity
        finally:
            for ffn in model.ffns():
                del ffn.hidden
        return {
            "source": self.path.resolve().name,
            "activation": self.smooth,
            "before": before,
            "swapped": swapped,
        }


def _smooth_hidden(ffn: ExpertFFN, activation: Callable[[Tensor], Tensor], x_TD: Tensor) -> Tensor:
    """`ExpertFFN.hidden` with another activation."""
    up_TF = x_TD @ ffn.up.T
    if ffn.up_bias is not None:
        up_TF = up_TF + ffn.up_bias
    return activation(up_TF) if ffn.gate is None else activation(x_TD @ ffn.gate.T) * up_TF


def read_start(path: Path, *, relufy: bool = False) -> Start:
    """The model in `path`: a checkpoint of our own, or, to `relufy`, of Hugging Face's format.

    Raises:
        CheckpointError: if it cannot be read.
        ConfigError: if it has nothing to relufy, or would have.
    """
    return _read_smooth(path) if relufy else _read_checkpoint(path)


def _read_checkpoint(path: Path) -> Start:
    source = open_source(path)
    require(
        source.family == "ambidex",
        f"--from {path}: is a {source.family} model that has no experts yet; import it first "
        f"(ambidex import)",
    )
    entries = verify_manifest(path)
    config = ModelConfig.from_dict(read_json(path / "config.json"))
    tensors = load_tensors(path, entries)
    kept = {n: t.float() for n, t in tensors.items() if not n.endswith("ffn.router")}
    hashes = sorted(e["sha256"] for n, e in entries.items() if n.endswith(".safetensors"))
    identity = hashlib.sha256("".join(hashes).encode()).hexdigest()
    tokenizer = read_tokenizer(path, config)
    return Start(path, config, kept, tokenizer, identity, texts=source.texts())


def _read_smooth(path: Path) -> Start:
    source = Source.open(path, relufy=True)
    source.check_tensors()
    found = source.config_json.get(source.table.activation_key) or source.table.default_activation
    require(
        found in SMOOTH,
        f"--relufy: {path} has the activation {found}, which needs no change; import it "
        f"(ambidex import)",
    )
    config = source.model_config
    experts, _ = choose_experts(config.intermediate_size)
    config = dataclasses.replace(
        config, experts=ExpertConfig(experts, config.intermediate_size // experts)
    )
    tensors = {name: t.float() for name, t in source.rest().items()}
    for index in range(config.num_hidden_layers):
        for name, tensor in source.layer(index).items():
            tensors[f"layers.{index}.{name}"] = tensor.float()
    tokenizer = read_tokenizer(path, config)
    identity = f"relufied {fingerprint(path)}"
    return Start(path, config, tensors, tokenizer, identity, found, source.texts())
