"""Training goes on from a model: ours, or a smooth one that becomes ReLU, measured on the way."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine import checkpoint
from engine.checkpoint import Checkpoint
from engine.errors import CheckpointError, ConfigError
from engine.policy import ExpertPolicy
from training.config import SwitchConfig, TrainConfig
from training.data.tokens import prepare_tokens
from training.errors import DataError, TrainingError
from training.importing.formats.smooth import SMOOTH
from training.importing.start import Start, read_start
from training.presets import with_settings
from training.quality.evaluation import evaluate
from training.trainer import Trainer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def short(start: Start, **changes: Any) -> TrainConfig:
    """A few steps from there."""
    base = dataclasses.replace(
        start.base(),
        steps=6,
        batch_size=2,
        sequence_length=16,
        evaluate_tokens=256,
        validate_share=0.0,
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture
def saved(tiny: Checkpoint, tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    checkpoint.save(tmp_path / "model", tiny.model, tiny.tokenizer, {})
    return tmp_path / "model"


def test_training_goes_on_from_a_checkpoint(saved: Path, corpus: Path, tmp_path: Path) -> None:
    start = read_start(saved)
    config = short(start, dtype="float32")
    trainer = Trainer(config, tmp_path / "run", [corpus], start=start)
    original = checkpoint.load(saved)
    before = evaluate(original.model, trainer.data.valid, ExpertPolicy.dense()).perplexity
    assert trainer.start_record == {"source": "model", "before": pytest.approx(before)}
    for (name, mine), (_, theirs) in zip(
        trainer.model.named_parameters(), original.model.named_parameters(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    trained = checkpoint.load(trainer.train())
    assert trained.report["start"]["before"] == pytest.approx(before)
    assert trained.report["evaluation"]["dense"]["perplexity"] < before
    assert trained.tokenizer.backend.to_str() == original.tokenizer.backend.to_str()
    assert trained.config.max_position_embeddings == 64  # not the run's shorter sequences
    assert "Trained on from model: dense perplexity" in (trained.path / "README.md").read_text()


def test_what_lay_beside_the_weights_stays_there(
    tiny: Checkpoint, corpus: Path, tmp_path: Path
) -> None:
    """A chat template, and what an export needs."""
    torch.set_num_threads(1)
    kept = {"chat_template.jinja": "{{ messages }}", "source_config.json": "{}"}
    checkpoint.save(tmp_path / "model", tiny.model, tiny.tokenizer, {}, kept)
    start = read_start(tmp_path / "model")
    trained = Trainer(short(start, steps=2), tmp_path / "run", [corpus], start=start).train()
    assert {name: (trained / name).read_text() for name in kept} == kept
    assert checkpoint.load(trained).chat_template == "{{ messages }}"


def test_a_resumed_run_needs_the_same_start(saved: Path, corpus: Path, tmp_path: Path) -> None:
    start = read_start(saved)
    config, run = short(start), tmp_path / "run"
    first = Trainer(config, run, [corpus], start=start).train()
    again = Trainer(config, run, [corpus], start=read_start(saved))
    assert again.progress is not None
    assert again.progress.step == config.steps
    other = dataclasses.replace(read_start(saved), identity="another")
    with pytest.raises(TrainingError, match="another configuration"):
        Trainer(short(other), run, [corpus], start=other)
    assert first.is_dir()


def test_the_start_decides_the_shape_and_the_tokenizer(
    saved: Path, corpus: Path, tmp_path: Path
) -> None:
    start = read_start(saved)
    wide = with_settings(short(start), ["model.hidden_size=32"])
    with pytest.raises(ConfigError, match=r"model: --from .* decides it"):
        Trainer(wide, tmp_path / "run", [corpus], start=start)
    long = with_settings(short(start), ["sequence_length=65"])
    with pytest.raises(ConfigError, match="sequence_length 65 is more than the 64 tokens"):
        Trainer(long, tmp_path / "run", [corpus], start=start)
    with pytest.raises(ConfigError, match="--set cannot change start"):
        with_settings(short(start), ["start=x"])
    tokens = tmp_path / "tokens"
    prepare_tokens(
        [corpus], [], tokens, vocab_size=270, valid_share=0.1, seed=1, report=lambda _text: None
    )
    with pytest.raises(DataError, match="prepared with another tokenizer than that of"):
        Trainer(short(start), tmp_path / "run2", [tokens], start=start)


def test_a_preset_gives_the_schedule_alone(saved: Path, micro: TrainConfig) -> None:
    start = read_start(saved)
    fitted = start.fitted(dataclasses.replace(micro, sequence_length=512, steps=7))
    assert (fitted.steps, fitted.sequence_length) == (7, 64)
    assert fitted.model.num_experts == 8
    assert start.base().switch == SwitchConfig(top_k=(2, 1), mixed_top_k=(1, 1))
    none = TrainConfig()
    assert none.digest == dataclasses.replace(none, start="").digest
    assert none.digest != fitted.digest


def smooth_model(path: Path, tokenizer: Path, kind: str) -> Any:
    """A random GPT-2 (GELU) or Llama (SiLU) of transformers' whose activations are not tiny."""
    torch.manual_seed(0)
    if kind == "silu":
        config: Any = transformers.LlamaConfig(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            hidden_act="silu",
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=0,
        )
        model: Any = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=300,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=64,
            activation_function=kind,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = transformers.GPT2LMHeadModel(config)
    model.eval().save_pretrained(path)
    (path / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return model


@pytest.mark.parametrize("kind", ["gelu_new", "gelu", "silu"])
def test_a_smooth_model_becomes_relu_and_says_what_that_cost(
    saved: Path, corpus: Path, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "smooth"
    theirs = smooth_model(path, saved / "tokenizer.json", kind)
    start = read_start(path, relufy=True)
    assert (start.smooth, start.config.hidden_act) == (kind, "relu")
    trainer = Trainer(short(start), tmp_path / "run", [corpus], start=start)
    assert not start.tensors  # freed: the model has them
    inputs_BL, targets_BL = trainer.data.valid[0]
    with torch.no_grad():
        logits = theirs(inputs_BL).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets_BL.flatten())
    record = start.measure(trainer.model, [(inputs_BL, targets_BL)])
    assert record["before"] == pytest.approx(math.exp(loss), rel=1e-4)  # transformers agrees
    assert record["swapped"] != pytest.approx(record["before"], rel=1e-3)
    if kind == "gelu":
        return  # the rest is alike
    trained = checkpoint.load(trainer.train())
    source = checkpoint.read_json(trained.path / "source_config.json")
    assert source == checkpoint.read_json(path / "config.json")
    told = trained.report["start"]
    assert told["activation"] == kind
    assert trained.report["evaluation"]["dense"]["perplexity"] < told["swapped"]
    assert trained.config.hidden_act == "relu"
    assert f"ReLU in place of {kind}" in (trained.path / "README.md").read_text()
    policy = ExpertPolicy.top_k(trained.config.experts.num_experts)
    torch.testing.assert_close(
        trained.model.logits(inputs_BL, policy),
        trained.model.logits(inputs_BL, ExpertPolicy.dense()),
        rtol=0.02,
        atol=0.02,
    )


def test_nothing_of_a_smooth_model_is_left_out_silently(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "smooth"
    smooth_model(path, saved / "tokenizer.json", "gelu_new")
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {"transformer.h.0.extra": torch.ones(2)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no GPT-2 model has a tensor .*h\.0\.extra"):
        read_start(path, relufy=True)


def test_what_needs_no_change_is_refused(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "relu"
    smooth_model(path, saved / "tokenizer.json", "relu")
    with pytest.raises(ConfigError, match="has the activation relu, which needs no change"):
        read_start(path, relufy=True)
    with pytest.raises(ConfigError, match="is a GPT-2 model that has no experts yet; import it"):
        read_start(path)


def test_every_smooth_activation_that_is_read_has_its_function() -> None:
    x = torch.linspace(-3, 3, 9)
    for name, function in SMOOTH.items():
        reference = transformers.activations.ACT2FN[name if name != "swish" else "silu"]
        torch.testing.assert_close(function(x), reference(x), msg=name, rtol=1e-3, atol=1e-3)
