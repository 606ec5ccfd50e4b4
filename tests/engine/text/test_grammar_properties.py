"""Whatever grammar is asked for: an output that finished satisfies it, as other parsers see it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.policy import ExpertPolicy
from engine.serving.engine import Engine
from engine.serving.request import SamplingParams
from engine.text import structured
from engine.text.grammar import Grammar
from tests.engine.conftest import serve

EXAMPLES = 40
TOGETHER = 4  # outputs of one grammar, in one batch

# Schemas

KEYS = st.sampled_from(["a", "b", "naïve", "two words", '"', "東"])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1000, 1000),
    st.text('ab"\\ \né東🙂', max_size=4),
)


def bounds(low: str, high: str, least: int, most: int) -> st.SearchStrategy[dict[str, int]]:
    """Either bound, both or none, in an order that something satisfies."""
    pairs = st.tuples(st.integers(least, most), st.integers(least, most)).map(sorted)
    chosen = st.sets(st.sampled_from([low, high]))
    return st.builds(
        lambda pair, names: {n: v for n, v in zip((low, high), pair, strict=True) if n in names},
        pairs,
        chosen,
    )


def typed(kind: str, rest: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return rest.map(lambda fields: {"type": kind, **fields})


def objects(values: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    properties = st.dictionaries(KEYS, values, max_size=3)

    def close(fields: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
        required = st.lists(st.sampled_from(sorted(fields)), unique=True) if fields else st.just([])
        return required.map(
            lambda names: {
                "type": "object",
                "properties": fields,
                "required": names,
                "additionalProperties": False,
            }
        )

    return properties.flatmap(close)


LEAVES = st.one_of(
    st.sampled_from([{"type": "null"}, {"type": "boolean"}]),
    typed("integer", bounds("minimum", "maximum", -300, 300)),
    typed("number", bounds("minimum", "maximum", -50, 50)),
    typed("string", bounds("minLength", "maxLength", 0, 6)),
    st.sampled_from(["^[a-c]{2}é?$", "^(cat|dög)s?$", "[0-9]x", "^$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.lists(SCALARS, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    SCALARS.map(lambda value: {"const": value}),
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects(inner),
        st.builds(
            lambda items, size: {"type": "array", "items": items, **size},
            inner,
            bounds("minItems", "maxItems", 0, 3),
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=5,
)

# Regular expressions, in what Python's syntax and that of Rust's crate have in common

LETTERS = "abz09 .*+?()[]{}|^$\\é東🙂\n-"
CHARACTERS = st.one_of(
    st.sampled_from(LETTERS).map(lambda c: f"\\{c}" if c in ".*+?()[]{}|^$\\-" else c),
    st.sampled_from(["[a-d]", "[0-9]", "[^a]", "[é東]", "[x-z]"]),
)
ATOMS = st.builds(
    lambda char, count: char + count,
    CHARACTERS,
    st.sampled_from(["", "", "?", "*", "+", "{2}", "{1,3}", "{0,2}"]),
)
REGEXES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.builds(lambda part, count: f"({part}){count}", inner, st.sampled_from(["?", "{1,2}"])),
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint) -> Iterator[Engine]:
    """Compiles without trying in another process first, which takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structured, "_check", lambda _source: None)
        yield Engine(checkpoint, EngineConfig(block_size=4))


def outputs(engine: Engine, grammar: Grammar, ends: Counter[str]) -> list[str]:
    """The texts that ended before they were cut off."""
    params = SamplingParams(max_new_tokens=100, temperature=1.0, seed=3, grammar=grammar)
    requests = engine.make_requests("the cat", params, ExpertPolicy.dense(), TOGETHER)
    events = serve(engine, [(0, request) for request in requests])
    ends.update(str(request.finish_reason) for request in requests)
    return [
        "".join(event.text for event in events[request.request_id])
        for request in requests
        if request.finish_reason == "eos_token"
    ]


def check(ends: Counter[str]) -> None:
    """Most end by themselves, and the others for want of room alone."""
    assert ends.keys() <= {"eos_token", "length"}
    assert ends["eos_token"] > ends.total() / 2, ends


quick = settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))


def test_json_satisfies_its_schema(engine: Engine) -> None:
    ends: Counter[str] = Counter()

    @quick
    @given(SCHEMAS)
    def ask(schema: dict[str, Any]) -> None:
        for text in outputs(engine, Grammar.json_schema(schema), ends):
            jsonschema.validate(json.loads(text), schema)

    ask()
    check(ends)


def test_text_matches_its_expression(engine: Engine) -> None:
    ends: Counter[str] = Counter()

    @quick
    @given(REGEXES)
    def ask(pattern: str) -> None:
        for text in outputs(engine, Grammar.regex(pattern), ends):
            assert re.fullmatch(pattern, text), text

    ask()
    check(ends)
