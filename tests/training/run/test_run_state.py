"""A disk that is full: one sentence, the earlier state intact, nothing half-written."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.text.tokenizer import Tokenizer
from training.config import TrainConfig
from training.data.vocabulary import train_tokenizer
from training.errors import StorageError
from training.run import run_state
from training.trainer import Trainer


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes fails, as on a full disk: with an error of the system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def trainer(micro: TrainConfig, corpus: Path, tmp_path: Path) -> Trainer:
    return Trainer(micro, tmp_path / "run", [corpus])


def stop_after_first_state(trainer: Trainer) -> None:
    with pytest.MonkeyPatch.context() as patched:
        save = Trainer._save_state

        def save_and_stop(self: Trainer) -> None:
            save(self)
            raise KeyboardInterrupt

        patched.setattr(Trainer, "_save_state", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()


def test_a_state_that_cannot_be_written_leaves_the_earlier_one(trainer: Trainer) -> None:
    stop_after_first_state(trainer)
    (state,) = trainer.run.glob("state-*")
    trainer.step += 1
    with largest_file(50_000), pytest.raises(StorageError) as caught:
        trainer._save_state()
    message = str(caught.value)
    path = trainer.run / f"state-{trainer.step:09d}"
    assert message.startswith(f"{path}: cannot be written (File too large")
    assert f"{state.name} is intact: free space and run the same command again" in message
    assert list(trainer.run.glob("*state-*")) == [state]
    assert list(trainer.run.glob(".state-*")) == []
    found = run_state.load_progress(trainer.run)
    assert found is not None
    assert found.step == trainer.step - 1


def test_the_first_state_and_the_log_too(trainer: Trainer) -> None:
    trainer.run.mkdir(exist_ok=True)
    with largest_file(10), pytest.raises(StorageError, match="no state was saved before"):
        trainer._save_state()
    assert not list(trainer.run.glob("*state*"))
    log = run_state.RunLog(trainer.run, None)
    with largest_file(10), pytest.raises(StorageError, match=r"log\.jsonl: cannot be written"):
        log.write(1, loss=2.0, outside=None)


def test_a_tokenizer_that_cannot_be_written(trainer: Trainer) -> None:
    """Weights fit, the tokenizer does not."""
    stop_after_first_state(trainer)
    (state,) = trainer.run.glob("state-*")
    weights = sum(p.stat().st_size for p in state.glob("*.safetensors"))
    tokens = dataclasses.replace(trainer.data.tokens, tokenizer=made_large(weights))
    trainer.data = dataclasses.replace(trainer.data, tokens=tokens)
    trainer.step += 1
    with largest_file(weights + 1000), pytest.raises(StorageError, match="File too large"):
        trainer._save_state()
    assert list(trainer.run.glob("*state-*")) == [state]


def made_large(size: int) -> Tokenizer:
    words = [f"{n:x}word{n * 7919:x}" for n in range(size // 16)]
    return train_tokenizer([" ".join(words)], 257 + size // 32)
