"""Outputs that follow a grammar: checked by parsers that know nothing of it."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.errors import InvalidRequest
from engine.policy import ExpertPolicy
from engine.serving.request import SamplingParams, TokenEvent
from engine.serving.sampler import sample
from engine.text import structured
from engine.text.grammar import MAX_GRAMMAR_BYTES, Grammar
from engine.text.structured import Grammars
from tests.engine.conftest import VOCABULARY, serve

if TYPE_CHECKING:
    from tests.engine.conftest import MakeEngine

DENSE, SPARSE = ExpertPolicy.dense(), ExpertPolicy.top_k(3)
PROMPT = "the cat"
GREEDY = SamplingParams(max_new_tokens=60)
SAMPLED = SamplingParams(max_new_tokens=60, temperature=1.0, seed=7)

SCHEMAS: list[dict[str, Any]] = [
    {"type": "boolean"},
    {"type": "integer", "minimum": -5, "maximum": 300},
    {"enum": ["cat", "dög", 3, None, [1, {"a": "東京"}]]},
    {"type": "string", "minLength": 2, "maxLength": 6},
    {"type": "string", "pattern": "^[a-c]{2}é?$"},
    {"type": "array", "items": {"type": "integer", "maximum": 9}, "minItems": 1, "maxItems": 3},
    {"anyOf": [{"type": "null"}, {"type": "string", "format": "date"}]},
    {
        "type": "object",
        "properties": {"b": {"type": "boolean"}, "a": {"$ref": "#/$defs/letter"}},
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {"letter": {"enum": ["x", "y"]}},
    },
    {"type": "object", "properties": {"naïve": {"const": "🙂"}}, "required": ["naïve"]},
]
REGEXES = [
    r"(cat|dog)s?",
    r"[0-9]{3}-[a-f]{2}",
    "(é|ß|東|🙂){1,4}",
    r"^x$",
    r"[^a]{2,5}\n",
    r"(the (cat|dog) )+sat",
    r"[0-9]+(\.[0-9]{2})?",
    "",
]


def text_of(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def schema_grammar(schema: dict[str, Any]) -> Grammar:
    return Grammar.json_schema(schema)


@pytest.mark.parametrize("policy", [DENSE, SPARSE], ids=str)
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_outputs_follow_their_grammars(
    make_engine: MakeEngine, params: SamplingParams, policy: ExpertPolicy
) -> None:
    """All in one batch, with company whose output is what it is alone."""
    engine = make_engine(max_num_seqs=32)
    grammars = [schema_grammar(s) for s in SCHEMAS] + [Grammar.regex(p) for p in REGEXES]
    free = dataclasses.replace(params, seed=params.seed and 11)
    alone = [t.token_id for t in engine.generate([PROMPT], free, policy)[0].tokens]
    bound = [
        engine.make_request(PROMPT, dataclasses.replace(params, grammar=g), policy)
        for g in grammars
    ]
    company = engine.make_request(PROMPT, free, policy)
    events = serve(engine, [(0, request) for request in (*bound, company)])
    assert company.output_ids == alone
    finished = 0
    for grammar, request in zip(grammars, bound, strict=True):
        text, reason = text_of(events[request.request_id]), request.finish_reason
        finished += reason == "eos_token"
        if reason != "eos_token":
            assert reason == "length"
        elif grammar.kind == "regex":
            assert re.fullmatch(grammar.source, text), grammar.source
        else:
            jsonschema.validate(json.loads(text), json.loads(grammar.source))
    assert finished >= len(grammars) // 2


def test_preemption_changes_nothing(make_engine: MakeEngine) -> None:
    params = dataclasses.replace(SAMPLED, grammar=Grammar.regex("([x-z]{3} ){8}[🙂é]"))
    roomy, tight = make_engine(), make_engine(blocks=20)
    texts = []
    for engine in (roomy, tight):
        requests = engine.make_requests(PROMPT, params, DENSE, 6)
        events = serve(engine, [(0, request) for request in requests])
        texts.append([text_of(events[request.request_id]) for request in requests])
        assert all(re.fullmatch("([x-z]{3} ){8}[🙂é]", text) for text in texts[-1])
    assert tight.scheduler.preemptions > 0
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 6


@pytest.mark.parametrize("kwargs", [{}, {"min_tokens": 9}, {"ignore_eos": True}])
def test_a_complete_grammar_ends_the_output(make_engine: MakeEngine, kwargs: Any) -> None:
    """At once, without a token for the end; nothing may follow, whatever else was asked for."""
    params = SamplingParams(max_new_tokens=20, grammar=Grammar.regex("cat"), **kwargs)
    result = make_engine().generate([PROMPT], params, DENSE)[0]
    assert (result.text, result.finish_reason) == ("cat", "eos_token")
    assert 0 not in result.token_ids


def test_the_end_comes_where_the_grammar_accepts(make_engine: MakeEngine) -> None:
    """However likely it is, and only as early as `min_tokens` and `ignore_eos` let it."""
    engine, likely = make_engine(), ((0, 100.0),)
    for kwargs, length in [({}, 2), ({"min_tokens": 5}, 5), ({"ignore_eos": True}, 8)]:
        params = SamplingParams(
            max_new_tokens=30, logit_bias=likely, grammar=Grammar.regex("[x-z]{2,8}"), **kwargs
        )
        result = engine.generate([PROMPT], params, DENSE)[0]
        assert re.fullmatch("[x-z]{2,8}", result.text)
        assert (len(result.text), result.finish_reason) == (length, "eos_token")


def test_stop_strings_end_it_early(make_engine: MakeEngine) -> None:
    params = SamplingParams(max_new_tokens=30, grammar=Grammar.regex("ab[0-9]{9}"), stop=("b",))
    result = make_engine().generate([PROMPT], params, DENSE)[0]
    assert (result.text, result.finish_reason) == ("ab", "stop_sequence")


def test_logprobs_are_the_models(make_engine: MakeEngine) -> None:
    """Before the mask: forbidden tokens appear among the alternatives."""
    engine = make_engine()
    free = engine.generate([PROMPT], SamplingParams(max_new_tokens=1, top_n_tokens=5), DENSE)[0]
    params = SamplingParams(max_new_tokens=1, top_n_tokens=5, grammar=Grammar.regex("🙂+"))
    bound = engine.generate([PROMPT], params, DENSE)[0]
    assert bound.top_tokens == free.top_tokens
    assert bound.tokens != free.tokens


def test_masks_are_applied_at_once(make_engine: MakeEngine) -> None:
    """Rows with and without a grammar against each row alone."""
    engine = make_engine()
    params = [
        dataclasses.replace(SAMPLED, grammar=grammar)
        for grammar in (None, Grammar.regex("[ab]+"), None, Grammar.regex("é+"))
    ]
    requests = [engine.make_request(PROMPT, p, DENSE) for p in params]
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(0))
    together = sample(logits, requests, 0)
    assert together == [sample(logits[i : i + 1], [r], 0)[0] for i, r in enumerate(requests)]
    assert engine.tokenizer.token_text(together[1].token_id)[0] in "ab"


def test_what_becomes_too_complex_fails_alone(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structured, "MAX_LEXER_STATES", 30)
    monkeypatch.setattr(structured, "MAX_OWN_STATES", 30)
    engine = make_engine()
    params = SamplingParams(max_new_tokens=100, temperature=1.0, seed=1)
    bound = dataclasses.replace(params, grammar=Grammar.regex("[ab]*a[ab]{40}"))
    hard = engine.make_request(PROMPT, bound, DENSE)
    company = engine.make_request(PROMPT, params, DENSE)
    events = serve(engine, [(0, hard), (0, company)])
    assert events[hard.request_id][-1].finish_reason == "error"
    assert events[hard.request_id][-1].error == "grammar is too complex to follow any further"
    assert events[hard.request_id][-1].own_fault
    assert company.finish_reason in ("length", "eos_token")
    # What its copies share is used up; later requests do not inherit that.
    later = engine.make_request(PROMPT, dataclasses.replace(bound, max_new_tokens=3), DENSE)
    events = serve(engine, [(0, later)])
    assert later.finish_reason == "length"
    assert all(event.error is None for event in events[later.request_id])


def test_one_output_cannot_use_up_what_others_need(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of one grammar, which has an easy part and a hard one: bias leads each into its own."""
    monkeypatch.setattr(structured, "MAX_LEXER_STATES", 60)
    monkeypatch.setattr(structured, "MAX_OWN_STATES", 60)
    engine = make_engine()
    grammar = Grammar.regex("x[y-z]{20}|[ab]*a[ab]{40}")
    hard_id, easy_id = (engine.tokenizer.encode(letter)[0] for letter in "ax")
    params = SamplingParams(max_new_tokens=60, temperature=1.0, seed=1, grammar=grammar)
    hard, easy = (
        engine.make_request(PROMPT, dataclasses.replace(params, logit_bias=((token, 30.0),)), DENSE)
        for token in (hard_id, easy_id)
    )
    alone = engine.make_request(PROMPT, easy.sampling, DENSE)
    events = serve(engine, [(0, hard), (0, easy), (200, alone)])
    assert events[hard.request_id][-1].own_fault
    assert easy.finish_reason == "eos_token"
    assert re.fullmatch("x[y-z]{20}", text_of(events[easy.request_id]))
    assert easy.output_ids == alone.output_ids


# --- compiling ------------------------------------------------------------------------------------


@pytest.fixture
def grammars(checkpoint: Checkpoint) -> Grammars:
    return Grammars(checkpoint.tokenizer, checkpoint.config.vocab_size)


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar.regex("(a"), "grammar cannot be compiled: unclosed group"),
        (Grammar.regex(r"(a)\1"), "backreferences are not supported"),
        (Grammar("json_schema", "{bad"), "grammar cannot be compiled: key must be a string"),
        (schema_grammar({"type": "set"}), "Invalid type: set"),
        (schema_grammar({"not": {}}), "Unimplemented keys"),
        (schema_grammar({"type": "string", "pattern": "(a"}), "unclosed group"),
    ],
)
def test_refused(grammars: Grammars, grammar: Grammar, reason: str) -> None:
    for _ in range(2):  # the second time from what is kept
        with pytest.raises(InvalidRequest, match=re.escape(reason)) as raised:
            grammars.matcher(grammar)
        assert "\n" not in str(raised.value)


def test_sizes() -> None:
    assert Grammar.regex("a" * MAX_GRAMMAR_BYTES)
    with pytest.raises(InvalidRequest, match="grammar must have at most 65536 bytes, got 65537"):
        Grammar.regex("a" * (MAX_GRAMMAR_BYTES + 1))
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"items": deep}
    with pytest.raises(InvalidRequest, match="grammar is nested too deeply"):
        schema_grammar(deep)
    while deep:  # or the interpreter recurses to free it
        deep = deep.pop("items")
    with pytest.raises(InvalidRequest, match="grammar must be a JSON schema"):
        schema_grammar({"const": float("nan")})


def test_compiling_is_bounded(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """A schema of 50 characters that would take minutes."""
    monkeypatch.setattr(structured, "COMPILE_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"grammar takes more than 0\.5 s to compile"):
        grammars.matcher(schema_grammar({"type": "integer", "multipleOf": 99999991}))
    assert time.monotonic() - start < 5


def test_what_is_kept_is_bounded(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "MAX_KEPT", 2)
    compiled: list[str] = []
    compile_one = Grammars._compile

    def counting(self: Grammars, grammar: Grammar) -> Any:
        compiled.append(grammar.source)
        return compile_one(self, grammar)

    monkeypatch.setattr(Grammars, "_compile", counting)
    for source in ("a", "b", "a", "c", "a", "b"):
        grammars.matcher(Grammar.regex(source))
    assert compiled == ["a", "b", "c", "b"]


def test_matchers_do_not_share_state(grammars: Grammars, checkpoint: Checkpoint) -> None:
    one, two = grammars.matcher(Grammar.regex("ab")), grammars.matcher(Grammar.regex("ab"))
    a, b = (checkpoint.tokenizer.encode(letter)[0] for letter in "ab")
    before = two.allowed()
    assert not one.advance(a)
    assert two.allowed() == before
    assert one.advance(b)
    assert len(before) == (VOCABULARY + 63) // 64 * 8
