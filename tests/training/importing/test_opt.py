"""A model that transformers saved, whose texts end with </s>: imported, resumed, generated from."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from engine.config import EngineConfig
from engine.errors import CheckpointError
from engine.policy import ExpertPolicy
from engine.serving.engine import Engine
from engine.serving.request import SamplingParams
from training.importing import pipeline
from training.importing.job import prepare_import
from training.importing.options import ImportOptions

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture
def opt(tmp_path: Path, corpus: Path) -> Path:
    """A random OPT in float16 of width 32, with the tokenizer's own end of text."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=300,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        init_std=0.2,
        bos_token_id=2,
        eos_token_id=2,
    )
    path = tmp_path / "opt"
    transformers.OPTForCausalLM(config).half().save_pretrained(path)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([(corpus / "000.txt").read_text()], trainer)
    backend.save(str(path / "tokenizer.json"))
    return path


class StopAfterOne(pipeline.SilentImport):
    def message(self, text: str) -> None:
        if text.startswith("layer 1"):
            raise KeyboardInterrupt


def test_an_opt_is_imported_in_two_sittings_and_generates(
    opt: Path, corpus: Path, tmp_path: Path
) -> None:
    options = ImportOptions(8, calibration_tokens=128, quality_tokens=64)
    out = tmp_path / "out"
    first = prepare_import(opt, out, [corpus], [], options)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(first, out, StopAfterOne())
    prepared = prepare_import(opt, out, [corpus], [], options)
    assert prepared.plan.family == "OPT"
    assert prepared.plan.config.torch_dtype == "bfloat16"
    quality = pipeline.run(prepared, out, pipeline.SilentImport())
    assert quality.curve.dense.perplexity > 1
    engine = Engine.load(out, EngineConfig(dtype="float32", kv_cache_bytes=1 << 20))
    ids = [5, 9, 30, 41]
    policies = (ExpertPolicy.dense(), ExpertPolicy.top_k(8))
    outputs = [
        engine.generate([ids], SamplingParams(max_new_tokens=8), policy)[0].token_ids
        for policy in policies
    ]
    theirs = transformers.OPTForCausalLM.from_pretrained(opt, dtype=torch.bfloat16).float().eval()
    expected = theirs.generate(
        torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=1
    )[0, 4:].tolist()
    assert list(outputs[0]) == list(outputs[1]) == expected
    assert (out / "source_config.json").is_file()


def test_tensors_that_nothing_reads_are_refused(opt: Path, corpus: Path, tmp_path: Path) -> None:
    tensors = load_file(opt / "model.safetensors")
    tensors["model.decoder.layers.0.adapter.weight"] = torch.zeros(3)
    save_file(tensors, opt / "model.safetensors", metadata={"format": "pt"})
    options = ImportOptions(8, calibration_tokens=128, quality_tokens=64)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"no OPT model has a tensor .*adapter\.weight"):
        prepare_import(opt, tmp_path / "out", [corpus], [], options)
    assert sorted(tmp_path.iterdir()) == before
