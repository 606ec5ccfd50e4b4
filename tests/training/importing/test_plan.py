"""What an import decides by itself, and what it refuses to decide."""

from __future__ import annotations

import dataclasses

import pytest

from engine.config import ExpertConfig, ModelConfig
from engine.errors import ConfigError
from training.importing.options import ImportOptions, choose_experts, parse_loss
from training.importing.plan import Plan, streams


def config(**changes: object) -> ModelConfig:
    """OPT-1.3B's shape in our own family."""
    shape = ModelConfig(
        vocab_size=50272,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=2048,
        experts=ExpertConfig(1, 8192),
        torch_dtype="float16",
    )
    return dataclasses.replace(shape, **changes)  # type: ignore[arg-type]  # fields by name


@pytest.mark.parametrize(
    ("neurons", "experts"),
    [
        (1024, 64),  # of 16, the finest
        (3072, 96),  # of 32
        (8192, 128),  # of 64
        (11008, 172),  # of 64
        (14336, 224),  # of 64
        (20480, 320),  # of 64
        (53248, 416),  # of 128: no more than 512 experts
        (100, 5),  # of 20
        (509, 509),
    ],
)
def test_the_number_of_experts_follows_from_the_neurons(neurons: int, experts: int) -> None:
    assert choose_experts(neurons)[0] == experts


def test_a_wish_is_kept_or_refused_by_name() -> None:
    assert choose_experts(8192, 64) == (64, "as asked for")
    assert choose_experts(8192, 0, 16) == (512, "as asked for")
    assert choose_experts(8192, 64, 128)[0] == 64
    with pytest.raises(ConfigError, match=r"--experts 60 must .* 8192 neurons; near it are"):
        choose_experts(8192, 60)
    with pytest.raises(ConfigError, match="--experts 1 must be at least 2"):
        choose_experts(8192, 1)
    with pytest.raises(ConfigError, match="--expert-size 8 must divide"):
        choose_experts(8192, 0, 8)  # 1,024 experts
    with pytest.raises(ConfigError, match="makes experts of 128 neurons, not of --expert-size 64"):
        choose_experts(8192, 64, 64)
    with pytest.raises(ConfigError, match="521 neurons have no divisor from 2 to 512"):
        choose_experts(521)


def test_a_loss_is_a_share() -> None:
    assert parse_loss("1%") == pytest.approx(0.01)
    assert parse_loss("0.02") == parse_loss(" 2 % ") == pytest.approx(0.02)
    assert parse_loss("0%") == 0
    for text in ("-1%", "101%", "2", "much", "1%%", "nan", ""):
        with pytest.raises(ConfigError, match="--max-loss must be a share between 0% and 100%"):
            parse_loss(text)


def test_options_out_of_range_are_named() -> None:
    for field, value, name in (
        ("num_experts", 513, "--experts"),
        ("cluster", "colour", "--cluster"),
        ("router", "best", "--router"),
        ("dtype", "float16", "--dtype"),
        ("calibration_tokens", -1, "--calibration-tokens"),
        ("seed", -1, "--seed"),
    ):
        with pytest.raises(ConfigError, match=name):
            ImportOptions(**{field: value})  # type: ignore[arg-type]  # fields by name


def test_the_plan_follows_from_the_shape() -> None:
    plan = Plan.make("OPT", config(), ImportOptions())
    assert plan.config.torch_dtype == "bfloat16"
    assert plan.config.experts.num_experts == 128
    assert plan.layer_parameters == 4 * 2048**2 + 2 * 2048 * 8192 + 2 * 2048
    assert plan.other_parameters == 50272 * 2048 + 2048
    rows = plan.calibration_tokens + len(plan.streams) * plan.quality_tokens
    assert plan.state_bytes == rows * 2048 * 2
    assert plan.memory_bytes > plan.state_bytes + 2 * 2 * plan.layer_parameters
    told = dict(plan.describe())
    assert told["experts"].startswith("128 of 64 neurons")
    assert "MiB" in told["memory"]
    # four times the layers take no more memory, but four times the work
    deep = Plan.make(
        "OPT",
        config(num_hidden_layers=96),
        ImportOptions(0, 0, "weights", "fitted", plan.calibration_tokens, plan.quality_tokens),
    )
    assert deep.memory_bytes == plan.memory_bytes
    assert deep.flops > 3 * plan.flops
    wide = Plan.make("OPT", config(torch_dtype="float32"), ImportOptions())
    assert wide.config.torch_dtype == "float32"
    assert wide.memory_bytes > 1.5 * plan.memory_bytes


def test_small_models_get_more_tokens_within_bounds() -> None:
    small = Plan.make(
        "x",
        config(num_hidden_layers=2, hidden_size=64, num_attention_heads=1, num_key_value_heads=1),
        ImportOptions(),
    )
    large = Plan.make("x", config(num_hidden_layers=96), ImportOptions())
    assert small.calibration_tokens == small.quality_tokens == 16384
    assert large.calibration_tokens == large.quality_tokens == 2048


def test_streams_are_named_and_never_twice() -> None:
    names = [stream.name for stream in streams(4)]
    assert names[0] == "dense"
    assert len(set(names)) == len(names) == 1 + 3 * 3  # k of 1, 2 and 3
    assert str(streams(64)[1].policy) == "top_k:4"
