"""Choices for a whole column of tokens, the count of what they read, and the benchmark itself."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import expert_union
from benchmarks.expert_union import (
    columns,
    equal_union,
    free_riders,
    marginal_union,
    measure,
    own_top_k,
    pooled,
    popular,
    union_sizes,
    whole_union,
)
from engine import checkpoint
from engine.checkpoint import STARTER
from engine.policy import ExpertPolicy

# One column of two tokens: by score, the first wants experts 0 1 2 3, the second 3 1 2 0.
SCORES = torch.tensor([[[9.0, 6.0, 5.0, 1.0], [1.0, 6.0, 5.0, 9.0]]])


def chosen(choice: torch.Tensor) -> list[list[int]]:
    """The experts of each token of the first column."""
    return [row.nonzero().flatten().tolist() for row in choice[0]]


def test_each_choice_by_hand() -> None:
    assert chosen(own_top_k(SCORES, 2)) == [[0, 1], [1, 3]]
    assert chosen(whole_union(SCORES, 2)) == [[0, 1, 3], [0, 1, 3]]
    assert chosen(free_riders(SCORES, 1, 2)) == [[0, 3], [0, 3]]
    assert chosen(free_riders(SCORES, 2, 2)) == chosen(own_top_k(SCORES, 2))
    assert chosen(pooled(SCORES, 2)) == [[0, 3], [0, 3]]
    assert union_sizes(own_top_k(SCORES, 2)).tolist() == [3]


def test_a_free_rider_never_has_more_than_the_union() -> None:
    same = SCORES[:, :1].repeat(1, 2, 1)
    assert chosen(free_riders(same, 1, 3)) == [[0], [0]]


def test_popularity_moves_a_token_to_what_others_want_too() -> None:
    scores = torch.tensor([[[9.0, 6.0, 5.0, 1.0], [1.0, 5.0, 6.0, 9.0], [1.0, 6.0, 5.0, 9.0]]])
    assert chosen(popular(scores, 2, 0.0)) == chosen(own_top_k(scores, 2))
    assert chosen(own_top_k(scores, 2)) == [[0, 1], [2, 3], [1, 3]]
    assert chosen(popular(scores, 2, 2.0)) == [[0, 1], [1, 3], [1, 3]]


def test_choices_of_one_column_do_not_see_another() -> None:
    scores = torch.randn(5, 4, 16, generator=torch.Generator().manual_seed(0))
    for name, choose in expert_union.candidates(16):
        whole = choose(scores)
        assert torch.equal(whole[2:3], choose(scores[2:3])), name


def test_independent_choices_at_the_measured_load() -> None:
    always, half = torch.tensor([True, True]), torch.tensor([True, False])
    load_TE = torch.stack((always, half, ~always), dim=1)
    assert marginal_union(load_TE, 3) == pytest.approx(1 + (1 - 0.5**3))


def test_columns_take_every_token_once_and_each_sequence_once() -> None:
    rows_CB = columns(6, 10, 3, seed=1)
    assert sorted(rows_CB.flatten().tolist()) == list(range(60))
    assert all(len({int(row) // 10 for row in column}) == 3 for column in rows_CB)
    pairs = columns(6, 10, 6, seed=1)
    assert torch.equal(rows_CB.view(-1, 6), pairs)  # smaller columns are parts of larger ones


def test_the_union_that_is_as_good_lies_on_the_curve() -> None:
    curve = [(4.0, 100.0), (8.0, 64.0), (16.0, 60.0)]
    assert equal_union(curve, 80.0) == pytest.approx(6.0)
    assert equal_union(curve, 64.0) == 8.0
    assert equal_union(curve, 101.0) is None
    assert equal_union(curve, 59.0) is None


def test_own_choice_in_columns_is_the_engines_policy_and_leaves_the_model_as_it_was() -> None:
    model = checkpoint.load(STARTER, "cpu", "float32").model
    ids_NL = torch.randint(4096, (4, 9), generator=torch.Generator().manual_seed(0))
    text = expert_union.Text(ids_NL[:, :-1], ids_NL[:, 1:])
    policy = ExpertPolicy.top_k(8)
    before = model.logits(text.inputs_NL, policy)
    found = measure(model, text, partial(own_top_k, k=8), columns(4, 8, 2, seed=0))
    loss = torch.nn.functional.cross_entropy(before.flatten(0, 1), text.targets_NL.flatten())
    assert found.perplexity == pytest.approx(math.exp(float(loss)), rel=1e-4)
    assert found.per_token == 8
    assert torch.equal(model.logits(text.inputs_NL, policy), before)


def test_the_tables_and_their_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_union, "OWN_KS", (2, 8, 64))
    monkeypatch.setattr(expert_union, "POOLS", (64,))
    monkeypatch.setattr(expert_union, "BONUSES", (1.0,))
    text = tmp_path / "text.py"
    lines = [f"def function_{i}(x):\n    return x + {i}\n" for i in range(400)]
    text.write_text("\n".join(lines), encoding="utf-8")
    path = tmp_path / "records.json"
    sizes = ["--sequences", "4", "--length", "16", "--batch", "2", "--try-batch", "4"]
    expert_union.main(["--data", str(text), *sizes, "--json", str(path)])
    printed = capsys.readouterr().out
    records = json.loads(path.read_text(encoding="utf-8"))
    by_choice = {(r["params"]["choice"], r["params"]["batch"]): r for r in records}
    assert by_choice["own 64", 4]["value"] == by_choice["pooled 64", 4]["value"] == 64
    assert 8 < by_choice["own 8", 2]["value"] < 16
    assert by_choice["own 8", 2]["params"]["uniform"] == pytest.approx(64 * (1 - (7 / 8) ** 2))
    dense, everything = by_choice["own 64", 4]["params"], by_choice["pooled 64", 4]["params"]
    assert everything["perplexity"] == dense["perplexity"]
    assert all(name in printed for name, _ in by_choice)
    assert str(tmp_path) not in path.read_text(encoding="utf-8")


def test_sequences_must_fill_their_columns(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        expert_union.main(["--sequences", "6", "--batch", "4", "--try-batch"])
    assert "multiple of every batch" in capsys.readouterr().err
