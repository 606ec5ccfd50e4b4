"""Perplexity by policy, against plain arithmetic."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.model.decoder import Decoder
from engine.policy import ExpertPolicy
from training.config import TrainConfig
from training.data.corpus import load_corpus, read_paths
from training.data.text import find_files
from training.data.vocabulary import encode_documents
from training.errors import DataError
from training.experts.conversion import refresh_router
from training.quality.evaluation import evaluate, quality_curve, read_text


@pytest.fixture
def model(micro: TrainConfig) -> Decoder:
    model = Decoder(micro.model.model_config(16, 0, "float32"))
    model.initialize(torch.Generator().manual_seed(0))
    for ffn in model.requires_grad_(False).ffns():
        refresh_router(ffn)
    return model


def test_perplexity_is_the_exponential_of_the_mean_loss(model: Decoder) -> None:
    ids = torch.randint(0, 300, (3, 17), generator=torch.Generator().manual_seed(1))
    batches = [(ids[:2, :-1], ids[:2, 1:]), (ids[2:, :-1], ids[2:, 1:])]
    result = evaluate(model, batches, ExpertPolicy.top_k(3))
    logprobs = model.logits(ids[:, :-1], ExpertPolicy.top_k(3)).log_softmax(-1)
    mean = -logprobs.gather(2, ids[:, 1:, None]).mean()
    assert result.perplexity == pytest.approx(math.exp(float(mean)), rel=1e-5)
    assert result.activated_ratio == pytest.approx(3 / 8)
    assert 3 / 8 < result.coverage < 1


def test_the_curve_has_every_share_and_recommends_the_sparsest_good_one(model: Decoder) -> None:
    ids = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(1))
    curve = quality_curve(model, [(ids[:, :-1], ids[:, 1:])])
    assert sorted(curve.routed) == [1, 2, 4]
    assert curve.dense.coverage == 1.0
    for k, oracle in curve.oracle.items():
        assert oracle.coverage >= curve.routed[k].coverage - 1e-6
    assert curve.recommended(8, tolerance=10.0) == "top_k:1"
    assert curve.recommended(8, tolerance=-10.0) == "dense"


@pytest.mark.parametrize("max_tokens", [1, 63, 64, 65, 127, 128, 129, 600, 1 << 20])
def test_text_is_cut_into_whole_sequences_that_never_exceed_max_tokens(
    max_tokens: int, tiny: Checkpoint, corpus: Path
) -> None:
    text = read_text(tiny, [corpus], max_tokens)
    assert text.length == min(64, max_tokens)
    most = min(max_tokens, text.available - 1)
    assert most - text.length < text.tokens <= most
    assert sum(targets.numel() for _, targets in text.batches) == text.tokens
    documents = read_paths([corpus])
    tokens = encode_documents(tiny.tokenizer, documents).astype("int64")
    inputs = torch.cat([inputs.flatten() for inputs, _ in text.batches])
    targets = torch.cat([targets.flatten() for _, targets in text.batches])
    assert inputs.tolist() == tokens[: text.tokens].tolist()
    assert targets.tolist() == tokens[1 : text.tokens + 1].tolist()


def test_text_too_short_for_a_sequence_is_refused(tiny: Checkpoint, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the cat\n")
    with pytest.raises(DataError, match=r"has \d+ tokens, fewer than one sequence of 65"):
        read_text(tiny, [short], 1000)
    assert read_text(tiny, [short], 1).tokens == 1


def test_sources_are_fingerprinted(tiny: Checkpoint, corpus: Path) -> None:
    file = corpus / "003.txt"
    first, second = read_text(tiny, [corpus, file], 64).sources
    listing = "".join(
        f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n"
        for f in sorted(corpus.iterdir())
    )
    assert first == {
        "path": str(corpus),
        "sha256": hashlib.sha256(listing.encode()).hexdigest(),
    }
    assert second["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_without_files_the_held_out_part_of_the_training_text_is_evaluated(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(20):
        (tmp_path / f"{i}.py").write_text(f"the cat sat on {i} " * 40)
    monkeypatch.setattr("training.data.corpus.standard_library", lambda: find_files([tmp_path]))
    corpus = load_corpus([], 0.3, 7)
    report: dict[str, Any] = {
        "config": {"valid_share": 0.3, "seed": 7},
        "corpus": {"fingerprint": corpus.fingerprint, "description": corpus.description},
    }
    text = read_text(dataclasses.replace(tiny, report=report), [], 1 << 20)
    expected = encode_documents(tiny.tokenizer, corpus.valid)
    assert text.available == expected.size
    assert text.batches[0][0].flatten()[:9].tolist() == expected[:9].tolist()
    assert text.sources[0]["sha256"] == corpus.fingerprint

    report["corpus"]["fingerprint"] = "another"
    with pytest.raises(DataError, match=r"trained on other text .* give --data"):
        read_text(dataclasses.replace(tiny, report=report), [], 1000)
    with pytest.raises(DataError, match="names no corpus; give --data"):
        read_text(tiny, [], 1000)
