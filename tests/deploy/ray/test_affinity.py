"""Which replica a request prefers: stable when replicas come and go, and within a bound of load."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.ray.affinity import preferences, prompt_key, ranked

NAMES = st.sets(st.text("abcdefgh0123", min_size=1, max_size=8), min_size=1, max_size=12)
KEYS = st.binary(min_size=1, max_size=40)


def key(**body: Any) -> bytes | None:
    return prompt_key(json.dumps(body).encode(), 8)


@given(NAMES, KEYS)
def test_a_replica_that_goes_or_comes_moves_no_other_key(names: set[str], key: bytes) -> None:
    order = ranked(key, names)
    assert sorted(order) == sorted(names)
    for gone in names:
        assert ranked(key, names - {gone}) == [name for name in order if name != gone]


def test_keys_are_spread_evenly() -> None:
    names = [f"replica-{i}" for i in range(8)]
    first = [ranked(str(i).encode(), names)[0] for i in range(4000)]
    for name in names:  # 500 expected, standard deviation 21
        assert 400 < first.count(name) < 600


@given(
    st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.integers(0, 50), min_size=1),
    KEYS,
    st.floats(1.01, 4.0),
)
def test_nobody_is_preferred_beyond_the_bound(
    loads: dict[str, int], key: bytes, bound: float
) -> None:
    groups = preferences(key, loads, bound)
    assert sorted(name for group in groups for name in group) == sorted(loads)
    chosen = groups[0][0]
    most = math.ceil(bound * (sum(loads.values()) + 1) / len(loads))
    assert loads[chosen] + 1 <= most
    better = ranked(key, loads)[: ranked(key, loads).index(chosen)]
    assert all(loads[name] >= most for name in better)  # passed over for that reason alone


@given(st.lists(KEYS, min_size=1, max_size=60), st.integers(1, 6))
def test_a_burst_of_requests_stays_within_the_bound(keys: list[bytes], count: int) -> None:
    loads = {f"r{i}": 0 for i in range(count)}
    for each in keys:
        loads[preferences(each, loads, 1.5)[0][0]] += 1
    assert max(loads.values()) <= math.ceil(1.5 * len(keys) / count)


def test_without_a_key_or_replicas() -> None:
    assert preferences(None, {"a": 3, "b": 1}) == [["a", "b"]]
    assert preferences(b"x", {}) == preferences(None, {}) == []


def test_the_key_is_the_beginning_of_the_prompt() -> None:
    assert key(inputs="a" * 8 + "b") == key(inputs="a" * 8 + "c", parameters={"x": 1}) == b"a" * 8
    assert key(prompt="a" * 9) == key(prompt=["a" * 8, "z"]) == b"a" * 8
    assert key(prompt=[1, 2, 3]) == key(prompt=[[1, 2, 9], [5]]) == b"1,2"
    assert key(inputs="ab") != key(inputs="abc")
    assert prompt_key('{"inputs": "\\ud800é"}'.encode(), 8) is not None


def test_a_conversation_keeps_its_key() -> None:
    first: list[Any] = [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}]
    later = [*first, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "why"}]
    parts = [first[0], {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    keys = {
        prompt_key(json.dumps({"messages": messages}).encode())
        for messages in (first, later, parts)
    }
    assert keys == {b"system: S\nuser: hi\n"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'{"inputs": 5}',
        b'{"inputs": ""}',
        b'{"prompt": []}',
        b'{"prompt": [[]]}',
        b'{"prompt": [{"a": 1}]}',
        b'{"messages": 5}',
        b'{"messages": [5, "x"]}',
        b'{"messages": [{"role": {}, "content": 7}]}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": ' + b"[" * 50_000,
    ],
)
def test_what_is_no_prompt_has_no_key(body: bytes) -> None:
    assert prompt_key(body) is None


FIELDS = st.sampled_from(["inputs", "prompt", "messages", "role", "content", "text"])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(FIELDS, inner),
    )
)
def test_any_json_is_taken(document: Any) -> None:
    found = prompt_key(json.dumps(document).encode(), 8)
    assert found is None or len(found.decode()) <= 48  # escapes of lone surrogates are longer
