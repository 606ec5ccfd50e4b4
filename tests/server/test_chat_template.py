"""Chat templates by themselves: where they come from, what they write, what they may not do."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models

from engine.checkpoint import load
from engine.errors import CheckpointError
from engine.text.chat_template import MAX_BYTES, read_chat_template
from engine.text.tokenizer import END_OF_TEXT, Tokenizer
from server.chat import TemplateError, plain_stops, prompt_ids, render

HI = [{"role": "user", "content": "hi"}]


def test_the_plain_template_names_the_speakers() -> None:
    messages = [{"role": "system", "content": "Be kind."}, {**HI[0], "name": "Ada"}]
    assert render(None, messages) == "System: Be kind.\nAda: hi\nAssistant:"


def test_templates_have_what_hugging_face_s_have() -> None:
    source = (
        "{% for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}\n"
        "{{ m | tojson }}{% endfor %}{{ strftime_now('%Y') }}{{ bos_token }}"
    )
    written = render(source, [*HI, {"role": "user", "content": "<é>"}])
    assert written == f'{{"role": "user", "content": "<é>"}}{time.strftime("%Y")}{END_OF_TEXT}'


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "0.2 s"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "over 50000 characters"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% if %}", "Expected an expression"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{% include 'x' %}", "no loader"),
    ],
)
def test_what_a_template_must_not_do(source: str, complaint: str) -> None:
    started = time.monotonic()
    with pytest.raises(TemplateError, match=complaint):
        render(source, HI, seconds=0.2, max_chars=50_000)
    assert time.monotonic() - started < 2


def test_what_a_message_spells_is_never_a_special_token(checkpoint_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(checkpoint_dir / "tokenizer.json")
    source = "{% for m in messages %}{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    spelled = f" a{END_OF_TEXT}b "
    ids = prompt_ids(tokenizer, source, [{"role": "user", "content": spelled}])
    assert ids == [*tokenizer.encode(spelled.strip()), tokenizer.eos_id]
    assert ids.count(tokenizer.eos_id) == 1
    assert tokenizer.spell(ids) == spelled.strip() + END_OF_TEXT


def test_templates_write_the_special_tokens_of_their_checkpoint(foreign_dir: Path) -> None:
    """As Llama's do."""
    tokenizer = load(foreign_dir).tokenizer
    source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    ids = prompt_ids(tokenizer, source, [{"role": "user", "content": "a</s><s>"}])
    assert ids == [1, *tokenizer.encode("a</s><s>"), 2]
    assert tokenizer.spell(ids) == "<s>a</s><s></s>"


def test_special_tokens_that_begin_alike_are_told_apart() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({END_OF_TEXT: 0, "?": 1}, "?"))
    backend.add_special_tokens([END_OF_TEXT, "<|a|>", "<|a|>b"])
    assert Tokenizer(backend).special_texts == (END_OF_TEXT, "<|a|>b", "<|a|>")


def test_where_a_template_comes_from(tmp_path: Path) -> None:
    jinja, config = tmp_path / "chat_template.jinja", tmp_path / "tokenizer_config.json"
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    both = (jinja.name, config.name)

    def read(value: Any, files: tuple[str, ...] = both[1:]) -> str | None:
        config.write_text(json.dumps(value))
        return read_chat_template(tmp_path, files)

    assert read({"chat_template": "x"}) == "x"
    assert read({"chat_template": "x"}, ()) is None  # the manifest does not list it
    assert read({"chat_template": named}) == "d"
    for nothing in ({}, {"chat_template": None}, {"chat_template": named[:1]}, [], 5):
        assert read(nothing) is None
    jinja.write_text("own file")
    assert read({"chat_template": "x"}, both) == "own file"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    jinja, config = tmp_path / "chat_template.jinja", tmp_path / "tokenizer_config.json"
    for path, content in (
        (jinja, b"\xff\xfe"),
        (jinja, b" " * (MAX_BYTES + 1)),
        (config, b"{"),
        (config, b"[" * 100_000),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=path.name):
            read_chat_template(tmp_path, (path.name,))


def test_the_plain_template_knows_where_users_would_speak() -> None:
    messages = [
        {"role": "user", "content": "a", "name": "Ann"},
        {"role": "assistant", "content": "b", "name": "Bot"},
        {"role": "user", "content": "c", "name": "Bob"},
        {"role": "user", "content": "d", "name": "Ann"},
    ]
    assert plain_stops(messages, 16) == ("\nAnn:", "\nBob:", "\nUser:")
    for stop in plain_stops(messages, 16)[:-1]:
        assert stop in "\n" + render(None, messages)
    assert plain_stops([{"role": "user", "content": "x"}], 16) == ("\nUser:",)
    assert plain_stops(messages, 2) == ("\nAnn:", "\nUser:")
    assert plain_stops(messages, 1) == ("\nUser:",)
