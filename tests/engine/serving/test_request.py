"""Policies and sampling parameters say what is wrong, and what is allowed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import ExpertConfig
from engine.errors import ConfigError, InvalidRequest
from engine.policy import ExpertPolicy
from engine.serving.request import Request, SamplingParams, TokenCounts


@pytest.mark.parametrize("text", ["dense", "auto", "top_k:8", "mass:0.95", "shared:8", "oracle:3"])
def test_policies_read_back_what_they_print(text: str) -> None:
    assert str(ExpertPolicy.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "top_k", "top_k:x", "dense:1", "mass:", "sparse", "top_k:1.5", "shared", "shared:4-16"],
)
def test_an_unknown_policy_is_refused(text: str) -> None:
    sentence = "experts must be dense, auto, top_k:N, mass:SHARE or shared:N; got"
    with pytest.raises(InvalidRequest, match=sentence):
        ExpertPolicy.parse(text)


@given(st.text(max_size=200))
def test_any_text_is_a_policy_or_a_sentence(text: str) -> None:
    sentence = ""
    try:
        assert str(ExpertPolicy.parse(text))
    except InvalidRequest as error:
        sentence = str(error)
    assert len(sentence) < 500  # 40 characters of it are quoted, each escaped to 10 at most


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (ExpertPolicy.top_k(0), "experts.top_k must be between 1 and 8, got 0"),
        (ExpertPolicy.top_k(9), "experts.top_k must be between 1 and 8, got 9"),
        (ExpertPolicy.shared(0), "experts.shared must be between 1 and 8, got 0"),
        (ExpertPolicy.shared(9), "experts.shared must be between 1 and 8, got 9"),
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


def test_auto_never_means_shared() -> None:
    with pytest.raises(ConfigError, match="must be dense, top_k:N or mass:SHARE, not shared:3"):
        ExpertConfig(num_experts=8, expert_size=4, default_policy="shared:3")


def test_only_the_newest_token_of_an_output_shares() -> None:
    request = Request("r", [5, 6, 7], SamplingParams(), ExpertPolicy.shared(3))
    own = ExpertPolicy.top_k(3)
    assert request.next_policy == own
    request.num_computed = 2  # the prompt's last token, on its own
    assert request.next_policy == own
    request.num_computed, request.token_ids = 3, [5, 6, 7, 8]
    assert request.next_policy == ExpertPolicy.shared(3)
    request.num_computed, request.token_ids = 3, [5, 6, 7, 8, 9]  # recomputed
    assert request.next_policy == own
    assert request.alone_policy == own
    for policy in (ExpertPolicy.dense(), own, ExpertPolicy.mass(0.5)):
        request.policy = policy
        assert request.next_policy == request.alone_policy == policy


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
        ("prompt_top_n", 21, "from 0 to 20"),
        ("min_tokens", -1, "from 0 to max_new_tokens, which is 100; got -1"),
        ("min_tokens", 101, "from 0 to max_new_tokens, which is 100; got 101"),
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


@pytest.mark.parametrize("bias", [-100.1, 101.0, float("nan"), float("inf")])
def test_biases_are_bounded(bias: float) -> None:
    with pytest.raises(InvalidRequest, match="logit_bias values must be from -100 to 100, got"):
        SamplingParams(logit_bias=((1, 1.0), (2, bias)))


def test_lists_of_tokens_are_bounded() -> None:
    SamplingParams(
        logit_bias=tuple((i, 100.0) for i in range(300)), stop_token_ids=tuple(range(16))
    )
    with pytest.raises(InvalidRequest, match="logit_bias takes at most 300 tokens"):
        SamplingParams(logit_bias=tuple((i, 1.0) for i in range(301)))
    with pytest.raises(InvalidRequest, match="logit_bias must name each token once"):
        SamplingParams(logit_bias=((3, 1.0), (3, 2.0)))
    with pytest.raises(InvalidRequest, match="stop_token_ids takes at most 16 tokens"):
        SamplingParams(stop_token_ids=tuple(range(17)))


def test_alternatives_of_the_prompt_need_its_logprobs() -> None:
    SamplingParams(prompt_logprobs=True, prompt_top_n=20)
    with pytest.raises(InvalidRequest, match="prompt_top_n needs prompt_logprobs"):
        SamplingParams(prompt_top_n=1)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=8),
    st.lists(st.integers(0, 5), max_size=12),
    st.integers(0, 12),
)
def test_counts_grow_with_the_output(prompt: list[int], output: list[int], first: int) -> None:
    counts = TokenCounts()
    counts.update(prompt + output[:first], len(prompt))
    counts.update(prompt + output, len(prompt))
    assert len(counts.token_ids) == len(set(counts.token_ids))
    assert dict(zip(counts.token_ids, counts.in_output, strict=True)) == {
        token: output.count(token) for token in prompt + output
    }
