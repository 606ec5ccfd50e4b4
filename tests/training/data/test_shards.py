"""Shards on disk: what is read is what was written; damage gets a sentence; memory stays small."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models

from engine.checkpoint import FORMAT as MANIFEST_FORMAT
from engine.checkpoint import MANIFEST, STARTER, file_sha256, write_json
from engine.text.tokenizer import END_OF_TEXT, Tokenizer
from training.data.batches import TokenBatches
from training.data.shards import Ids, open_shards, write_shards
from training.errors import DataError, StorageError

VOCABULARY = 300


def made_tokenizer(size: int) -> Tokenizer:
    vocabulary = {END_OF_TEXT: 0} | {f"t{i}": i for i in range(1, size)}
    return Tokenizer(tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[])))


def write(path: Path, train: Ids, valid: Ids, size: int = VOCABULARY, shard_bytes: int = 64) -> Any:
    write_shards(
        path,
        made_tokenizer(size),
        [(False, train[:50]), (True, valid), (False, train[50:])],
        description="made up",
        fingerprint="f" * 64,
        made_from={"seed": 1},
        shard_bytes=shard_bytes,
    )


def random_ids(count: int, size: int = VOCABULARY) -> Ids:
    return np.random.default_rng(0).integers(0, size, count, dtype=np.uint32)


@pytest.fixture
def ids() -> tuple[Ids, Ids]:
    return random_ids(333), random_ids(70)


@pytest.fixture
def folder(tmp_path: Path, ids: tuple[Ids, Ids]) -> Path:
    write(tmp_path / "tokens", *ids)
    return tmp_path / "tokens"


def test_what_is_read_is_what_was_written(folder: Path, ids: tuple[Ids, Ids]) -> None:
    found = open_shards(folder)
    np.testing.assert_array_equal(found.train[:], ids[0])
    np.testing.assert_array_equal(found.valid[:], ids[1])
    assert [s.tokens for s in found.index.train] == [32] * 10 + [13]
    assert [s.file for s in found.index.valid] == [f"valid-0000{i}.bin" for i in range(3)]
    assert (found.index.train_tokens, found.index.valid_tokens) == (333, 70)
    assert (found.index.dtype, found.index.vocab_size) == ("uint16", VOCABULARY)
    assert (folder / "train-00000.bin").read_bytes() == ids[0][:32].astype("<u2").tobytes()
    assert not [p for p in folder.parent.iterdir() if p != folder]


def test_batches_of_shards_are_those_of_memory(folder: Path, ids: tuple[Ids, Ids]) -> None:
    mapped = TokenBatches(open_shards(folder).train, 3, 9, seed=4)
    memory = TokenBatches(ids[0], 3, 9, seed=4)
    for step in (*range(30), 1000, 7):
        for found, expected in zip(mapped.batch(step), memory.batch(step), strict=True):
            assert torch.equal(found, expected)


def test_a_vocabulary_above_two_bytes_takes_four(tmp_path: Path) -> None:
    for size, dtype in ((1 << 16, "uint16"), ((1 << 16) + 1, "uint32")):
        train = np.array([0, size - 1, 5], dtype=np.uint32)
        write(tmp_path / dtype, train, train, size)
        found = open_shards(tmp_path / dtype)
        assert found.index.dtype == dtype
        np.testing.assert_array_equal(found.train[:], train)


def test_what_decides_the_batches_decides_the_fingerprint(
    folder: Path, tmp_path: Path, ids: tuple[Ids, Ids]
) -> None:
    def fingerprint(train: Ids, valid: Ids, size: int = VOCABULARY) -> str:
        path = tmp_path / "other"
        write(path, train, valid, size)
        return open_shards(path).index.tokens_fingerprint

    own = open_shards(folder).index.tokens_fingerprint
    assert fingerprint(*ids) == own
    others = {
        fingerprint(ids[0][:-1], ids[1]),
        fingerprint(ids[0], ids[1][:-1]),
        fingerprint(*ids, VOCABULARY + 1),
        fingerprint(ids[1], ids[0]),
    }
    assert len(others | {own}) == 5


def test_empty_parts_and_foreign_ids_are_refused(tmp_path: Path) -> None:
    one, none = random_ids(60), random_ids(0)
    path = tmp_path / "tokens"
    with pytest.raises(DataError, match="made up: has no text to train on"):
        write(path, none, one)
    with pytest.raises(DataError, match="made up: has no text to hold out"):
        write(path, one, none)
    with pytest.raises(DataError, match="holds token 300, outside the vocabulary of 300"):
        write(path, one, np.array([300], dtype=np.uint32))
    assert not list(tmp_path.iterdir())


def change_index(folder: Path, **values: Any) -> None:
    index = json.loads((folder / "index.json").read_text()) | values
    write_json(folder / "index.json", index)


def renew_manifest(folder: Path) -> None:
    files = [p for p in folder.iterdir() if p.name != MANIFEST]
    entries = {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in files}
    write_json(folder / MANIFEST, {"format": MANIFEST_FORMAT, "files": entries})


def truncate(folder: Path) -> None:
    path = folder / "train-00003.bin"
    path.write_bytes(path.read_bytes()[:-2])


def flip(folder: Path) -> None:
    path = folder / "valid-00001.bin"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


def another_tokenizer(folder: Path) -> None:
    made_tokenizer(VOCABULARY + 1).backend.save(str(folder / "tokenizer.json"))
    renew_manifest(folder)


def another_vocabulary(folder: Path) -> None:
    change_index(folder, vocab_size=VOCABULARY - 1)
    renew_manifest(folder)


def foreign_ids(folder: Path) -> None:
    path = folder / "train-00002.bin"
    path.write_bytes(np.full(32, VOCABULARY + 7, dtype="<u2").tobytes())
    index = json.loads((folder / "index.json").read_text())
    index["train"][2]["sha256"] = file_sha256(path)
    change_index(folder, **index)
    renew_manifest(folder)


def other_sums(folder: Path) -> None:
    path = folder / "train-00002.bin"
    path.write_bytes(path.read_bytes()[::-1])
    renew_manifest(folder)


def change_shard(folder: Path, **values: Any) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["train"][0] |= values
    change_index(folder, **index)


def fewer_shards(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    change_index(folder, train=index["train"][:-1])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"train-00003\.bin: has 62 bytes, manifest says 64"),
    "flipped": (flip, r"valid-00001\.bin: damaged"),
    "missing": (lambda f: (f / "train-00004.bin").unlink(), r"train-00004\.bin: missing"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), r"manifest\.json: missing"),
    "no index": (lambda f: (f / "index.json").unlink(), r"index\.json: missing"),
    "no json": (lambda f: (f / "index.json").write_text("{"), "not readable as JSON"),
    "format": (lambda f: change_index(f, format=2), "format must be 1, got 2; make it anew"),
    "foreign": (lambda f: change_index(f, extra=1), "is not an index of token shards"),
    "type": (lambda f: change_index(f, vocab_size="9"), "vocab_size must be of type int, got '9'"),
    "dtype": (lambda f: change_index(f, dtype="int8"), "dtype must be uint16 or uint32, got 'int8"),
    "width": (lambda f: change_index(f, dtype="uint32"), "cannot hold 32 tokens of uint32 in 64"),
    "above": (lambda f: change_shard(f, file="../a.bin"), "'../a.bin' is not a shard of 32"),
    "words": (lambda f: change_shard(f, tokens="a", bytes="aa"), "is not an index of token shar"),
    "empty": (lambda f: change_shard(f, tokens=0, bytes=0), "is not a shard of 0 tokens"),
    "uneven": (lambda f: change_shard(f, tokens=9, bytes=18), "train shards must hold 32 tokens"),
    "fewer": (fewer_shards, "train_tokens 333 is not what its shards hold"),
    "tokenizer": (another_tokenizer, r"tokenizer\.json: is not the tokenizer that the shards"),
    "vocabulary": (another_vocabulary, r"tokenizer\.json: has 300 tokens, index\.json says 299"),
    "ids": (foreign_ids, r"train-00002\.bin: holds token 307, outside the vocabulary of 300"),
    "sums": (other_sums, r"says otherwise about train-00002\.bin than manifest\.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_gets_a_sentence(folder: Path, kind: str) -> None:
    damage, sentence = DAMAGE[kind]
    damage(folder)
    with pytest.raises(DataError, match=sentence) as caught:
        open_shards(folder)
    assert str(caught.value).startswith(str(folder))


def test_sizes_are_compared_without_verifying(folder: Path) -> None:
    truncate(folder)
    with pytest.raises(DataError, match=r"train-00003\.bin: has 62 bytes, index\.json says 64"):
        open_shards(folder, verify=False)
    (folder / "train-00003.bin").unlink()
    with pytest.raises(DataError, match=r"train-00003\.bin: cannot be read"):
        open_shards(folder, verify=False)
    (folder / MANIFEST).write_text('{"files": 3}')
    with pytest.raises(DataError, match=r"says otherwise about train-00000\.bin"):
        open_shards(folder, verify=False)


def test_a_full_disk_leaves_what_was_there(
    folder: Path, ids: tuple[Ids, Ids], monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = Path.open

    class Full:
        def __init__(self, file: BinaryIO) -> None:
            self.name, self.close = file.name, file.close

        def write(self, content: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def full_open(path: Path, *arguments: Any, **options: Any) -> Any:
        file: Any = real_open(path, *arguments, **options)
        return Full(file) if path.name == "train-00004.bin" and "w" in arguments[0] else file

    before = open_shards(folder).index
    monkeypatch.setattr(Path, "open", full_open)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        write(folder, *ids)
    assert str(caught.value).startswith(f"{folder}: cannot be written (No space left")
    monkeypatch.undo()
    assert open_shards(folder).index == before
    assert [p.name for p in folder.parent.iterdir()] == ["tokens"]


PREPARE = """
import resource, sys
from pathlib import Path
from training.data.tokens import prepare_tokens
from training.data.vocabulary import read_tokenizer

def peak():  # not getrusage, which begins at the parent's size
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10

paths, out, tokenizer, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
known = read_tokenizer(Path(tokenizer))
before = peak()
prepare_tokens(
    [Path(paths)], [], Path(out), vocab_size=known.vocab_size, valid_share=0.01, seed=1,
    report=lambda text: None, tokenizer=known, shard_bytes=1 << 20,
)
print(peak() - before)
"""


def prepare_elsewhere(corpus: Path, out: Path, limit: int = 0) -> subprocess.CompletedProcess[str]:
    """Prepare `corpus` in a process of its own; prints the bytes by which its memory grew."""
    starter = STARTER
    command = [sys.executable, "-c", PREPARE, str(corpus), str(out), str(starter), str(limit)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


def test_a_real_limit_on_file_sizes_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a few words to begin with\n" * 40_000)
    result = prepare_elsewhere(tmp_path / "a.txt", tmp_path / "tokens", limit=200_000)
    sentence = f"StorageError: {tmp_path}/tokens: cannot be written (File too large); nothing is"
    assert sentence in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def lines(rows: int) -> Iterator[str]:
    """Three documents of some rows, and one of 38 times as many."""
    for number in range(41):
        for row in range(rows):
            yield f"{row % 97} rows of {number} words are on this line, no more than {row}.......\n"
        yield f"{END_OF_TEXT}\n" if number < 3 else ""


def memory_for(folder: Path, rows: int) -> tuple[int, int]:
    """Bytes of a text of lines(rows), and by how much memory grows when it is prepared."""
    folder.mkdir()
    path = folder / "a.txt"
    with path.open("w") as file:
        file.writelines(lines(rows))
    result = prepare_elsewhere(path, folder / "tokens")
    assert result.returncode == 0, result.stderr
    assert len(open_shards(folder / "tokens").index.train) >= 2
    return path.stat().st_size, int(result.stdout)


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    few, many = memory_for(tmp_path / "few", 1000), memory_for(tmp_path / "many", 5200)
    assert many[0] - few[0] > 10_000_000
    # Not even the text fits, let alone its tokens.
    assert many[1] - few[1] < 0.9 * (many[0] - few[0])
