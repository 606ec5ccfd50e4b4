"""Policies and sampling parameters say what is wrong, and what is allowed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidRequest
from engine.request import ExpertPolicy, SamplingParams


@pytest.mark.parametrize("text", ["dense", "auto", "top_k:8", "mass:0.95", "oracle:3"])
def test_policies_read_back_what_they_print(text: str) -> None:
    assert str(ExpertPolicy.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "top_k", "top_k:x", "dense:1", "mass:", "sparse", "top_k:1.5"]
)
def test_an_unknown_policy_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="experts must be dense, auto, top_k:N or mass:SHARE"):
        ExpertPolicy.parse(text)


@given(st.text(max_size=200))
def test_any_text_is_a_policy_or_a_sentence(text: str) -> None:
    sentence = ""
    try:
        assert str(ExpertPolicy.parse(text))
    except InvalidRequest as error:
        sentence = str(error)
    assert len(sentence) < 200


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (ExpertPolicy.top_k(0), "experts.top_k must be between 1 and 8, got 0"),
        (ExpertPolicy.top_k(9), "experts.top_k must be between 1 and 8, got 9"),
        (ExpertPolicy.mass(0.0), "experts.mass must be above 0 and at most 1"),
        (ExpertPolicy.mass(1.1), "experts.mass must be above 0 and at most 1"),
        (ExpertPolicy.mass(float("nan")), "experts.mass must be above 0 and at most 1"),
    ],
)
def test_values_out_of_range_are_refused(policy: ExpertPolicy, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        policy.validate(8)


def test_auto_is_what_the_checkpoint_says() -> None:
    assert ExpertPolicy.auto().resolve("top_k:3") == ExpertPolicy.top_k(3)
    assert ExpertPolicy.dense().resolve("top_k:3") == ExpertPolicy.dense()


@pytest.mark.parametrize(
    ("field", "value", "bounds"),
    [
        ("max_new_tokens", 0, "from 1 to"),
        ("temperature", -0.1, "from 0 to 100"),
        ("temperature", float("inf"), "from 0 to 100"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("typical_p", 0.0, "above 0 and at most 1"),
        ("min_p", 1.5, "from 0 to 1"),
        ("repetition_penalty", 0.0, "above 0"),
        ("frequency_penalty", 2.5, "from -2 to 2"),
        ("presence_penalty", float("nan"), "from -2 to 2"),
        ("seed", -1, "from 0 to"),
        ("top_n_tokens", 21, "from 0 to 20"),
    ],
)
def test_sampling_names_the_field_and_its_range(field: str, value: float, bounds: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field} must be {bounds}"):
        SamplingParams(**{field: value})  # type: ignore[arg-type]  # the point of the test


def test_stop_strings_are_bounded() -> None:
    with pytest.raises(InvalidRequest, match="at most 16 strings"):
        SamplingParams(stop=("x",) * 17)
    with pytest.raises(InvalidRequest, match="1 to 256 characters"):
        SamplingParams(stop=("",))
