"""An import keeps the function, measures what a run of the whole model measures, and survives."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from engine import checkpoint
from engine.checkpoint import Checkpoint, save_tensors
from engine.errors import AmbidexError, CheckpointError
from engine.policy import ExpertPolicy
from training.errors import DataError, StorageError, TrainingError
from training.importing import job, pipeline, workspace
from training.importing.formats.reader import KEPT_FILES, SOURCE_CONFIG
from training.importing.job import prepare_import
from training.importing.options import ImportOptions
from training.quality.evaluation import evaluate

if TYPE_CHECKING:
    from tests.training.importing.conftest import Run


def loaded(path: Path) -> Checkpoint:
    return checkpoint.load(path, dtype="float32")


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def test_the_dense_function_stays_and_neurons_only_move(
    run: Run, model_dir: Path, tmp_path: Path
) -> None:
    run(tmp_path / "out")
    before, after = loaded(model_dir), loaded(tmp_path / "out")
    ids = torch.randint(0, 280, (3, 16), generator=torch.Generator().manual_seed(1))
    dense = ExpertPolicy.dense()
    expected = before.model.logits(ids, dense)
    torch.testing.assert_close(after.model.logits(ids, dense), expected, rtol=1e-4, atol=1e-4)
    every = after.model.logits(ids, ExpertPolicy.top_k(8))
    torch.testing.assert_close(every, expected, rtol=1e-4, atol=1e-4)
    for old, new in zip(before.model.ffns(), after.model.ffns(), strict=True):
        rows = {tuple(row) for row in torch.cat([old.up, old.down], 1).tolist()}
        assert rows == {tuple(row) for row in torch.cat([new.up, new.down], 1).tolist()}
        assert not torch.equal(old.up, new.up)
        assert bool(new.router.any())
    assert after.tokenizer.encode("the cat") == before.tokenizer.encode("the cat")


def test_the_curve_is_what_the_whole_model_scores(
    run: Run, model_dir: Path, corpus: Path, options: ImportOptions, tmp_path: Path
) -> None:
    quality = run(tmp_path / "out")
    curve = quality.curve
    after = loaded(tmp_path / "out")
    text = prepare_import(model_dir, tmp_path / "other", [corpus], [], options).text
    batches = [(text.held_BL[:, :-1], text.held_BL[:, 1:])]
    dense = evaluate(after.model, batches, ExpertPolicy.dense())
    assert curve.dense.perplexity == pytest.approx(dense.perplexity, rel=1e-4)
    assert sorted(curve.routed) == sorted(curve.oracle) == sorted(curve.random) == [1, 2, 3, 4, 6]
    for k in (1, 4):
        for found, policy in (
            (curve.routed[k], ExpertPolicy.top_k(k)),
            (curve.oracle[k], ExpertPolicy.oracle(k)),
        ):
            whole = evaluate(after.model, batches, policy)
            assert found.perplexity == pytest.approx(whole.perplexity, rel=1e-3)
            assert found.activated_ratio == pytest.approx(k / 8)
            assert found.coverage == pytest.approx(whole.coverage, abs=0.05)  # every eighth token
    # planted groups are found: the router is near its oracle, and both far above chance
    assert curve.oracle[2].coverage >= curve.routed[2].coverage > curve.random[2].coverage + 0.2
    assert curve.random[4].coverage == pytest.approx(0.5, abs=0.1)
    points = after.config.experts.quality
    assert [p.top_k for p in points] == [1, 2, 3, 4, 6]
    assert all(error is not None and error > 0 for error in quality.errors.values())


def test_the_policy_is_the_sparsest_within_the_budget_or_dense(
    run: Run, options: ImportOptions, tmp_path: Path
) -> None:
    strict = run(tmp_path / "strict", dataclasses.replace(options, max_loss=0.0))
    loose = run(tmp_path / "loose", dataclasses.replace(options, max_loss=1.0))
    relative = {p.top_k: p.relative for p in loaded(tmp_path / "loose").config.experts.quality}
    within = [k for k, loss in relative.items() if loss <= 1.0]
    assert loose.recommended == f"top_k:{min(within)}"
    none = [k for k, loss in relative.items() if loss <= 0]
    assert strict.recommended == (f"top_k:{min(none)}" if none else "dense")
    for path, quality in ((tmp_path / "strict", strict), (tmp_path / "loose", loose)):
        assert loaded(path).config.experts.default_policy == quality.recommended
        assert quality.recommended in (path / "README.md").read_text()
    assert "lose at most 100% of perplexity" in (tmp_path / "loose" / "README.md").read_text()


def test_the_report_tells_every_layer(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "a<b>"
    run(out)
    report = json.loads((out / "training_report.json").read_text())
    assert len(report["layers"]) == len(report["active_neurons"]) == 3
    layer = report["layers"][0]
    assert layer["router"] in ("fitted", "centroid")
    assert 0 < layer["coverage"]["routed:2"] <= layer["coverage"]["oracle:2"] + 0.05
    assert report["imported"]["family"] == "ambidex"
    page = (out / "report.html").read_text()
    assert "a&lt;b&gt;" in page
    assert "<b>" not in page
    for title in ("Quality by share", "Sparsity by layer", "Coverage by layer", "random"):
        assert title in page
    assert "<script" not in page


class Killed(BaseException):
    """Nothing in the import may catch it, as nothing catches SIGKILL."""


class KillAfter(pipeline.SilentImport):
    """Ends the import when so many layers have been reported."""

    def __init__(self, layers: int) -> None:
        self.left = layers
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)
        self.left -= text.startswith("layer")
        if not self.left:
            raise Killed


def test_a_killed_import_goes_on_to_the_same_bytes(run: Run, tmp_path: Path) -> None:
    run(tmp_path / "whole" / "out")
    out = tmp_path / "part" / "out"
    for layers in (1, 1):  # twice: each time one more layer
        with pytest.raises(Killed):
            run(out, monitor=KillAfter(layers))
    work = out.parent / ".out.import"
    (work / ".layer-00002.99.tmp").mkdir()  # what a kill within a layer leaves
    (work / "states-00000").mkdir()  # or between new states and the removal of the old ones
    assert not out.exists()
    rest = KillAfter(9)
    run(out, monitor=rest)
    assert rest.messages[0] == "going on behind layer 2 of 3"
    assert len(rest.messages) == 2
    assert files(out) == files(tmp_path / "whole" / "out")
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_what_lay_beside_the_weights_stays_there(run: Run, model_dir: Path, tmp_path: Path) -> None:
    """A chat template for one, when a checkpoint is imported once more."""
    kept = {name: f'{{"kept": "{name}"}}' for name in (SOURCE_CONFIG, *KEPT_FILES)}
    loaded = checkpoint.load(model_dir)
    checkpoint.save(tmp_path / "first", loaded.model, loaded.tokenizer, {}, kept)
    run(tmp_path / "again", source=tmp_path / "first")
    for name, text in kept.items():
        assert (tmp_path / "again" / name).read_text() == text
    assert checkpoint.load(tmp_path / "again").chat_template == kept["chat_template.jinja"]
    run(tmp_path / "bare")
    written = checkpoint.read_json(tmp_path / "bare" / "generation_config.json")
    assert written == {"eos_token_id": loaded.config.eos_token_id}


def test_what_a_kill_leaves_of_the_checkpoint_is_swept(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "x" / "out"
    with pytest.raises(Killed):
        run(out, monitor=KillAfter(1))
    left = [out.parent / ".out.99.tmp", out.parent / ".outer.99.tmp"]
    for path in left:
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"")
    run(out)
    assert sorted(p.name for p in out.parent.iterdir()) == [".outer.99.tmp", "out"]


@pytest.mark.parametrize(
    ("name", "what"), [("_kernels", "CPU kernels"), ("processor", "processor")]
)
def test_what_rounds_otherwise_does_not_go_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "out", monitor=KillAfter(1))
    monkeypatch.setattr(job, name, lambda: "another")
    with pytest.raises(TrainingError, match=f"half-done import with another {what}"):
        run(tmp_path / "out")


def test_another_command_does_not_go_on_unless_told_to(
    run: Run, model_dir: Path, options: ImportOptions, tmp_path: Path
) -> None:
    out = tmp_path / "x" / "out"
    with pytest.raises(Killed):
        run(out, monitor=KillAfter(1))
    other = dataclasses.replace(options, seed=2)
    with pytest.raises(TrainingError, match=r"half-done import with another settings.*--fresh"):
        run(out, other)
    (model_dir / "config.json").touch()
    with pytest.raises(TrainingError, match="half-done import with another source"):
        run(out)
    run(out, other, fresh=True)
    run(tmp_path / "y" / "out", other)
    assert files(out) == files(tmp_path / "y" / "out")


def test_a_full_disk_is_one_sentence_and_loses_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x" / "out"
    save, calls = save_tensors, []

    def full(*arguments: object, **named: object) -> None:
        calls.append(1)
        if len(calls) == 3:  # of layer 1, after both of layer 0
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(workspace, "save_tensors", full)
    with pytest.raises(StorageError, match=r"No space left.*1 layers are done and intact"):
        run(out)
    assert not out.exists()
    monitor = KillAfter(9)
    run(out, monitor=monitor)
    assert monitor.messages[0] == "going on behind layer 1 of 3"
    calls[:] = [1, 1]
    with pytest.raises(StorageError, match="no layer is done yet"):
        run(tmp_path / "z" / "out")
    assert not list((tmp_path / "z").iterdir())


def test_damage_to_a_half_done_import_is_seen(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Killed):
        run(out, monitor=KillAfter(2))
    (tmp_path / ".out.import" / "layer-00000" / "result.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"layer-00000/result.json"):
        run(out)


def test_refusals_leave_nothing_behind(
    model_dir: Path, corpus: Path, options: ImportOptions, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" ")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    before = sorted(tmp_path.rglob("*"))

    def refused(
        error: type[AmbidexError],
        match: str,
        source: Path = model_dir,
        out: Path = tmp_path / "out",
        text: Path = corpus,
        wanted: ImportOptions = options,
    ) -> None:
        with pytest.raises(error, match=match):
            prepare_import(source, out, [text], [], wanted)

    refused(TrainingError, "is there already; give --out a new directory", out=corpus)
    refused(CheckpointError, "no such directory", source=tmp_path / "none")
    refused(AmbidexError, "config.json: model_type", source=bare)
    refused(DataError, "no text found", text=empty)
    refused(DataError, "no such file or folder", text=tmp_path / "none")
    wrong = dataclasses.replace(options, num_experts=7)
    refused(AmbidexError, "--experts 7 must .* divide the model's 32 neurons", wanted=wrong)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_tokenizer_is_named(
    model_dir: Path, corpus: Path, options: ImportOptions, tmp_path: Path
) -> None:
    path = model_dir / "tokenizer.json"
    path.unlink()
    manifest = json.loads((model_dir / "manifest.json").read_text())
    del manifest["files"]["tokenizer.json"]
    (model_dir / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"tokenizer.json: missing; transformers' Auto"):
        prepare_import(model_dir, tmp_path / "out", [corpus], [], options)


def test_weights_that_are_not_finite_are_refused_in_the_end(
    run: Run, model_dir: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    before = loaded(model_dir)
    with torch.no_grad():
        before.model.layers[2].ffn.down[3] = float("inf")  # type: ignore[union-attr, index, operator]
    checkpoint.save(broken, before.model, before.tokenizer, {})
    with pytest.raises(TrainingError, match="dense loss on the held-out text is not finite"):
        run(tmp_path / "out", source=broken)
    assert not (tmp_path / "out").exists()


def test_standard_errors_are_those_of_sequences_and_may_be_missing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of a sequence go together; of a stream whose loss is not finite none is told."""
    calls: list[int] = []

    def losses(_: object, x_TD: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        calls.append(len(targets_T) // 16)
        by_sequence = torch.arange(calls[0]).repeat_interleave(16).double()
        if len(calls) == 1:
            return torch.ones_like(by_sequence)
        return by_sequence if len(calls) > 2 else by_sequence / 0.0

    monkeypatch.setattr("training.importing.curve.token_losses", losses)
    first, *others = run(tmp_path / "out").errors.values()
    sequences = torch.arange(calls[0]).double()
    assert first is None
    assert others == [pytest.approx(float(sequences.std()) / calls[0] ** 0.5)] * len(others)
    report = json.loads((tmp_path / "out" / "training_report.json").read_text())
    assert next(iter(report["standard_errors"].values())) is None


def test_routers_can_stay_centroids(run: Run, options: ImportOptions, tmp_path: Path) -> None:
    options = dataclasses.replace(options, router="centroid")
    quality = run(tmp_path / "out", options)
    report = json.loads((tmp_path / "out" / "training_report.json").read_text())
    assert {layer["router"] for layer in report["layers"]} == {"centroid"}
    assert quality.curve.routed[2].coverage > quality.curve.random[2].coverage
