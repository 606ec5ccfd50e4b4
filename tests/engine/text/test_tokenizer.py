"""Streaming text equals whole text, and never shows half a character."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, processors

from engine.checkpoint import STARTER, Checkpoint
from engine.errors import CheckpointError
from engine.text.tokenizer import END_OF_TEXT, IncrementalDecoder, Tokenizer, text_offsets
from tests.engine.conftest import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@given(st.text(min_size=1, max_size=40), st.integers(0, 10))
def test_pieces_join_to_the_text(text: str, split: int) -> None:
    ids = TOKENIZER.encode(text)
    prompt, rest = ids[:split], ids[split:]
    decoder = IncrementalDecoder(TOKENIZER, prompt)
    pieces = [decoder.push(token) for token in rest] + [decoder.flush()]
    if "\ufffd" not in TOKENIZER.decode(prompt):  # the prompt ends at a character's end
        assert "".join(pieces) == TOKENIZER.decode(ids)[len(TOKENIZER.decode(prompt)) :]


def test_half_a_character_waits() -> None:
    ids = TOKENIZER.encode("🙂")
    assert len(ids) > 1
    decoder = IncrementalDecoder(TOKENIZER, TOKENIZER.encode("a"))
    pieces = [decoder.push(token) for token in ids]
    assert pieces[:-1] == [""] * (len(ids) - 1)
    assert pieces[-1] == "🙂"


def test_a_character_that_never_ends_is_flushed_lossily() -> None:
    decoder = IncrementalDecoder(TOKENIZER, [])
    assert decoder.push(TOKENIZER.encode("🙂")[0]) == ""
    assert decoder.flush() == "\ufffd"


def test_a_prompt_cannot_spell_the_end_of_text(checkpoint: Checkpoint) -> None:
    tokenizer = checkpoint.tokenizer
    assert tokenizer.eos_id not in tokenizer.encode(f"a{END_OF_TEXT}b")
    assert tokenizer.decode(tokenizer.encode(END_OF_TEXT)) == END_OF_TEXT


def test_special_tokens_leave_no_text() -> None:
    assert TOKENIZER.decode([TOKENIZER.eos_id]) == ""
    assert TOKENIZER.token_text(TOKENIZER.eos_id) == END_OF_TEXT
    assert isinstance(TOKENIZER.backend, tokenizers.Tokenizer)
    assert isinstance(TOKENIZER, Tokenizer)


def test_another_token_may_end_a_text_if_there_is_one() -> None:
    token = TOKENIZER.encode("a")[0]
    other = Tokenizer(tiny_tokenizer().backend, token)
    assert other.eos_id == token != TOKENIZER.eos_id
    with pytest.raises(CheckpointError, match="has no token 99999, which is to end a text"):
        Tokenizer(tiny_tokenizer().backend, 99999)


def spelled(tokenizer: Tokenizer, text: str) -> list[bytes]:
    return [tokenizer.token_bytes(token) for token in tokenizer.encode(text)]


def test_every_byte_is_known() -> None:
    texts = {TOKENIZER.token_bytes(i): TOKENIZER.token_text(i) for i in range(TOKENIZER.vocab_size)}
    assert {bytes([value]) for value in range(256)} < texts.keys()
    for raw, text in texts.items():
        assert raw.decode("utf-8", "replace") == text
    assert TOKENIZER.token_bytes(TOKENIZER.vocab_size) == b""


@given(st.text(max_size=40))
def test_bytes_of_tokens_are_those_of_the_text(text: str) -> None:
    raw = spelled(TOKENIZER, text)
    assert b"".join(raw) == text.encode()
    whole = [b"".join(raw[:i]).decode("utf-8", "ignore") for i in range(len(raw))]
    assert text_offsets(raw, text) == list(map(len, whole))


@given(st.lists(st.binary(max_size=3)))
def test_offsets_of_any_bytes_lead_into_the_text(raw: list[bytes]) -> None:
    text = b"".join(raw).decode("utf-8", "replace")
    offsets = text_offsets(raw, text)
    assert offsets == sorted(offsets)
    for token, at in zip(raw, offsets, strict=True):
        if token[:1].isascii() and token:
            assert text[at] == chr(token[0])


def byte_fallback() -> Tokenizer:
    """As SentencePiece makes them: a mark for the space, one in front, `<0xE6>` for a byte."""
    words = [END_OF_TEXT, *(f"<0x{value:02X}>" for value in range(256)), "\u2581", "a", "é"]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    backend.add_special_tokens([END_OF_TEXT])
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend)


LLAMA = byte_fallback()


def test_tokenizers_with_byte_fallback() -> None:
    raw = spelled(LLAMA, "é 東a")
    assert raw == [b" ", "é".encode(), b" ", b"\xe6", b"\x9d", b"\xb1", b"a"]
    assert text_offsets(raw, "é 東a") == [0, 0, 1, 2, 2, 2, 3]


TEXTS = st.text(st.sampled_from("a é東京😀🙂\u0301\n<") | st.characters(codec="utf-8"), max_size=20)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, LLAMA], ids=["bytes", "fallback"])
@given(TEXTS, st.integers(0, 80), st.integers(0, 6))
def test_what_follows_any_prompt_loses_nothing(
    tokenizer: Tokenizer, text: str, cut: int, ends: int
) -> None:
    """A character that the prompt only begins is the continuation's."""
    ids = tokenizer.encode(text)
    whole = cut = min(cut, len(ids))
    while not is_whole(tokenizer, ids[:whole]):
        whole -= 1
    if whole == cut:
        ids[cut:cut] = [tokenizer.eos_id] * ends
        cut += ends
    decoder = IncrementalDecoder(tokenizer, ids[:cut])
    pieces = [*map(decoder.push, ids[cut:]), decoder.flush()]
    assert "".join(pieces) == tokenizer.decode(ids)[len(tokenizer.decode(ids[:whole])) :]
    if "\ufffd" not in text:
        assert pieces[-1] == ""


def is_whole(tokenizer: Tokenizer, ids: list[int]) -> bool:
    """Whether these tokens end where a character does."""
    try:
        b"".join(map(tokenizer.token_bytes, ids)).decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize(
    ("template", "start"), [("<s> $A", [1]), ("<s> $A </s>", [1]), ("$A </s>", []), ("$A", [])]
)
def test_texts_begin_as_the_post_processor_has_it(template: str, start: list[int]) -> None:
    words = {word: i for i, word in enumerate(["</s>", "<s>", "a", "b", "c"])}
    backend = tokenizers.Tokenizer(models.BPE(words, []))
    backend.add_special_tokens(["</s>", "<s>"])
    backend.post_processor = processors.TemplateProcessing(
        template, None, [("<s>", 1), ("</s>", 0)]
    )
    tokenizer = Tokenizer(backend, eos_id=0, bos_id=1)
    assert tokenizer.start_ids == start
    assert tokenizer.encode("abc") == [2, 3, 4]
    assert tokenizer.encode_prompt("abc") == [*start, 2, 3, 4]
    assert tokenizer.encode_prompt("abc", 3) == ([1, 3, 4] if start else [2, 3, 4])
    assert tokenizer.encode_prompt("abc", 1) == (start or [4])
    assert tokenizer.started([1, 2]) == [1, 2]


def test_models_trained_here_begin_with_the_text() -> None:
    starter = Tokenizer.from_file(STARTER / "tokenizer.json")
    assert starter.start_ids == TOKENIZER.start_ids == []
    assert starter.encode_prompt("a cat") == starter.encode("a cat")


def test_bytes_that_become_no_character_spoil_none_before_them() -> None:
    ids = LLAMA.encode("😀東a")
    decoder = IncrementalDecoder(LLAMA, [])
    broken = [*ids[:5], ids[5], ids[-1]]  # all of the first character, a byte of the second
    assert [decoder.push(token) for token in broken] == [*[""] * 4, "😀", "", "\ufffda"]
