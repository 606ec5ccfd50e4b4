"""Streaming text equals whole text, and never shows half a character."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpoint import Checkpoint
from engine.errors import CheckpointError
from engine.tokenizer import END_OF_TEXT, IncrementalDecoder, Tokenizer
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
