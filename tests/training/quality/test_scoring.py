"""Continuations: where the boundary lies, and batches against one sequence at a time."""

from __future__ import annotations

import dataclasses
import random

import pytest
import tokenizers
import torch
from tokenizers import processors

from engine.checkpoint import Checkpoint
from engine.model.decoder import Decoder
from engine.model.experts import true_mass
from engine.model.trace import Trace
from engine.policy import ExpertPolicy
from engine.text.tokenizer import Tokenizer
from training.errors import TrainingError
from training.quality import scoring
from training.quality.expert_use import ExpertUse
from training.quality.scoring import Continuation, Score, encode_pairs, padded_tokens, score

POLICIES = ["dense", "top_k:3", "top_k:8", "mass:0.5", "oracle:2"]


def random_continuations(count: int, longest: int = 64) -> list[Continuation]:
    """Of 1 to `longest` inputs, some with one target and some with as many as possible."""
    source = random.Random(5)
    lengths = [2, longest + 1, *(source.randint(2, longest + 1) for _ in range(count - 2))]
    return [
        Continuation(tuple(source.randrange(280) for _ in range(n)), source.randint(1, n - 1))
        for n in lengths
    ]


def one_by_one(model: Decoder, c: Continuation, policy: ExpertPolicy) -> Score:
    """The reference: the sequence alone, all its logits, a sum in a loop."""
    logits_LV = model.logits(torch.tensor([c.ids[:-1]]), policy)[0]
    total, greedy = 0.0, True
    for position in range(len(c.ids) - c.targets, len(c.ids)):
        total += float(logits_LV[position - 1].double().log_softmax(0)[c.ids[position]])
        greedy = greedy and int(logits_LV[position - 1].argmax()) == c.ids[position]
    return Score(total, greedy)


@pytest.mark.parametrize("policy", [ExpertPolicy.parse(p) for p in POLICIES], ids=POLICIES)
@pytest.mark.parametrize("batch_tokens", [1, 200, 2048])
def test_batches_score_as_one_sequence_at_a_time(
    policy: ExpertPolicy, batch_tokens: int, tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_BATCH_TOKENS", batch_tokens)
    continuations = random_continuations(40)
    continuations[7] = greedy_continuation(tiny.model, policy)
    scores = score(tiny.model, continuations, policy, ExpertUse())
    expected = [one_by_one(tiny.model, c, policy) for c in continuations]
    assert [s.greedy for s in scores] == [e.greedy for e in expected]
    assert scores[7].greedy
    assert not all(s.greedy for s in scores)
    for s, e in zip(scores, expected, strict=True):
        assert s.loglikelihood == pytest.approx(e.loglikelihood, rel=1e-4, abs=1e-4)


def test_tokens_see_the_model_s_window_alone(tiny: Checkpoint) -> None:
    policy, continuations = ExpertPolicy.dense(), random_continuations(8)
    everything = score(tiny.model, continuations, policy, ExpertUse())
    tiny.model.config = dataclasses.replace(tiny.model.config, sliding_window=5)
    scores = score(tiny.model, continuations, policy, ExpertUse())
    for s, c in zip(scores, continuations, strict=True):
        expected = one_by_one(tiny.model, c, policy)
        assert s.loglikelihood == pytest.approx(expected.loglikelihood, rel=1e-4, abs=1e-4)
    assert scores != everything


def greedy_continuation(model: Decoder, policy: ExpertPolicy) -> Continuation:
    """Five tokens and the three that greedy decoding puts behind them."""
    ids = [5, 80, 17, 200, 9]
    for _ in range(3):
        ids.append(int(model.logits(torch.tensor([ids]), policy)[0, -1].argmax()))
    return Continuation(tuple(ids), 3)


@pytest.mark.parametrize("policy", [ExpertPolicy.parse(p) for p in POLICIES], ids=POLICIES)
def test_expert_use_leaves_padding_out(policy: ExpertPolicy, tiny: Checkpoint) -> None:
    continuations = random_continuations(12)
    use = ExpertUse()
    score(tiny.model, continuations, policy, use)
    activated = tokens = 0
    inside = total = 0.0
    for c in continuations:
        trace = Trace(keep_inputs=True)
        tiny.model.logits(torch.tensor([c.ids[:-1]]), policy, trace)
        activated += int(trace.counts()[0].sum())
        tokens += len(c.ids) - 1
        for ffn, x_TD, chosen in zip(tiny.model.ffns(), trace.inputs, trace.chosen, strict=True):
            mass_TE = true_mass(x_TD, ffn.up, 8, ffn.activation)
            inside += float(mass_TE.sum() if chosen is None else mass_TE[chosen].sum())
            total += float(mass_TE.sum())
    assert use.available == tokens * 2 * 8
    assert use.activated == activated
    assert use.coverage == pytest.approx(inside / total, rel=1e-4)
    if policy.kind == "top_k":
        assert use.activated_ratio == policy.value / 8


def test_work_is_what_is_reported_as_done(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_BATCH_TOKENS", 128)
    continuations = random_continuations(30)
    done: list[int] = []
    score(tiny.model, continuations, ExpertPolicy.dense(), ExpertUse(), done.append)
    assert len(done) > 5
    assert max(done) <= 128
    assert sum(done) == padded_tokens(continuations)
    assert sum(done) >= sum(len(c.ids) - 1 for c in continuations)


def test_broken_weights_are_no_score(tiny: Checkpoint) -> None:
    tiny.model.embedding.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="under dense are not finite"):
        score(tiny.model, random_continuations(3), ExpertPolicy.dense(), ExpertUse())


def test_nothing_to_score_is_no_score(tiny: Checkpoint) -> None:
    assert score(tiny.model, [], ExpertPolicy.dense(), ExpertUse()) == []


def test_space_at_the_boundary_belongs_to_the_continuation(tiny: Checkpoint) -> None:
    encode = tiny.tokenizer.encode
    pairs = [("the cat", " sat on"), ("the cat ", "sat on"), ("the cat \n", "sat")]
    first, second, third = encode_pairs(tiny.tokenizer, pairs)
    assert first == second
    assert first.ids == tuple(encode("the cat sat on"))
    assert first.ids[-first.targets :] == tuple(encode(" sat on"))
    assert third.ids[: -third.targets] == tuple(encode("the cat"))


def test_every_text_begins_as_the_tokenizer_has_it(tiny: Checkpoint) -> None:
    backend = tokenizers.Tokenizer.from_str(tiny.tokenizer.source)
    token = backend.id_to_token(7)
    backend.post_processor = processors.TemplateProcessing(f"{token} $A", None, [(token, 7)])
    pairs = [("the cat", " sat"), ("", "the cat")]
    plain = encode_pairs(tiny.tokenizer, pairs)
    begun = encode_pairs(Tokenizer(backend, 0), pairs)
    assert begun[0] == Continuation((7, *plain[0].ids), plain[0].targets)
    assert begun[1] == Continuation((7, *plain[1].ids[1:]), plain[1].targets)


def test_every_cut_of_a_text_scores_all_that_is_new(tiny: Checkpoint) -> None:
    text = "the cat sat,  on\nthe döner 東京 🙂 log"
    whole = tuple(tiny.tokenizer.encode(text))
    pairs = [(text[:cut], text[cut:]) for cut in range(len(text))]
    spanning = 0
    for (context, rest), c in zip(pairs, encode_pairs(tiny.tokenizer, pairs), strict=True):
        before = c.ids[: -c.targets]
        assert before
        assert c.ids[-len(whole) :] == whole  # the model sees the text's own tokens
        assert 1 <= c.targets <= len(whole)
        seen = tiny.tokenizer.decode(list(before))
        assert context.startswith(seen)  # nothing of the continuation is given away
        spanning += len(seen) < len(context.rstrip())
        assert len(seen) + len(tiny.tokenizer.decode(list(c.ids[-c.targets :]))) == len(text)
        assert rest
    assert spanning > 3  # cuts inside a word, where the harness would lose a token


@pytest.mark.parametrize("context", ["", "  ", "\n"])
def test_an_empty_context_is_the_end_of_text(context: str, tiny: Checkpoint) -> None:
    (c,) = encode_pairs(tiny.tokenizer, [(context, "the cat")])
    assert c.ids == (0, *tiny.tokenizer.encode(context + "the cat"))
    assert c.targets == len(c.ids) - 1


def test_an_empty_continuation_has_no_target(tiny: Checkpoint) -> None:
    (c,) = encode_pairs(tiny.tokenizer, [("the cat", "")])
    assert c.targets == 0


def test_fitting_cuts_the_oldest_tokens() -> None:
    long = Continuation(tuple(range(20)), 2)
    assert long.fitted(5) == Continuation((14, 15, 16, 17, 18, 19), 2)
    assert long.fitted(19) == long
    assert dataclasses.replace(long, targets=5).fitted(5).ids[0] == 14
