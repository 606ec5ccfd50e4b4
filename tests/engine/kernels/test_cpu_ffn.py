"""The CPU FFN and linear layer: every way against the reference, at awkward shapes and choices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engine.kernels import cpu_ffn, cpu_linear
from engine.kernels.cpu_ffn import PackedExpertFFN, expert_ffn_reference
from engine.kernels.cpu_linear import PackedLinear

# (D, S, E): experts of 24 neurons in a width of 100 fit no vector register or tile.
SHAPES = [(100, 24, 7), (64, 16, 8), (33, 5, 3), (256, 16, 64), (48, 200, 2), (40, 12, 1)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
WAYS = ["rows", "grouped", "masked"]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture(params=["native", "widen", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The packed form: this processor's own choice, or the forms that other processors take."""
    if request.param != "native":
        for module in (cpu_ffn, cpu_linear):
            monkeypatch.setattr(module, "best_path", lambda _: request.param)
    return str(request.param)


def weights(D: int, S: int, E: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    up_FD = torch.randn(S * E, D) / D**0.5
    down_FD = torch.randn(S * E, D) / (S * E) ** 0.5
    return up_FD.to(dtype), down_FD.to(dtype)


def choices(T: int, E: int) -> dict[str, Tensor]:
    some = torch.rand(T, E) < 0.4
    uneven = some.clone()
    uneven[::2] = False  # tokens that chose nothing
    uneven[:, 0] = False  # an expert nobody chose
    one = torch.zeros(T, E, dtype=torch.bool)
    one[:, E - 1] = True
    return {
        "some": some,
        "uneven": uneven,
        "one": one,
        "none": torch.zeros_like(some),
        "all": torch.ones_like(some),
    }


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(actual.float(), expected.float(), atol=bound, rtol=bound)


def reference(x: Tensor, up: Tensor, down: Tensor, chosen: Tensor, act: str = "relu") -> Tensor:
    return expert_ffn_reference(x.float(), up.float(), down.float(), chosen, act)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 2, 13, 70])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sparse_and_dense_match_the_reference(
    path: str, shape: tuple[int, int, int], T: int, dtype: torch.dtype
) -> None:
    D, S, E = shape
    up, down = weights(D, S, E, dtype)
    ffn = PackedExpertFFN(up, down, E)
    x_TD = torch.randn(T, D).to(dtype)
    for chosen_TE in choices(T, E).values():
        assert_near(ffn.sparse(x_TD, chosen_TE), reference(x_TD, up, down, chosen_TE), dtype)
    everyone = torch.ones(T, E, dtype=torch.bool)
    assert_near(ffn.dense(x_TD), reference(x_TD, up, down, everyone), dtype)


@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 9, 40])
@pytest.mark.parametrize("way", WAYS)
def test_each_way_matches_the_reference(
    path: str,
    way: str,
    T: int,
    dtype: torch.dtype,
    activation: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    D, S, E = 100, 24, 7
    up, down = weights(D, S, E, dtype)
    ffn = PackedExpertFFN(up, down, E, activation)
    monkeypatch.setattr(ffn, "sparse_way", lambda *_: way)
    x_TD = torch.randn(T, D).to(dtype)
    for chosen_TE in choices(T, E).values():
        expected = reference(x_TD, up, down, chosen_TE, activation)
        assert_near(ffn.sparse(x_TD, chosen_TE), expected, dtype)


@pytest.mark.parametrize("way", ["rows", "gemm"])
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_both_dense_ways_match_the_reference(
    path: str, activation: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    up, down = weights(100, 24, 7, torch.float32)
    ffn = PackedExpertFFN(up, down, 7, activation)
    monkeypatch.setattr(ffn, "dense_way", lambda _: way)
    x_TD = torch.randn(5, 100)
    everyone = torch.ones(5, 7, dtype=torch.bool)
    expected = reference(x_TD, up, down, everyone, activation)
    assert_near(ffn.dense(x_TD), expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tokens(path: str, dtype: torch.dtype) -> None:
    up, down = weights(100, 24, 7, dtype)
    ffn = PackedExpertFFN(up, down, 7)
    x_TD = torch.empty(0, 100, dtype=dtype)
    assert ffn.dense(x_TD).shape == (0, 100)
    assert ffn.sparse(x_TD, torch.empty(0, 7, dtype=torch.bool)).shape == (0, 100)
    assert PackedLinear(up)(x_TD).shape == (0, 168)


def test_a_tokens_result_does_not_depend_on_its_batch() -> None:
    D, S, E, T = 128, 32, 8, 48
    up, down = weights(D, S, E, torch.float32)
    ffn = PackedExpertFFN(up, down, E)
    x_TD = torch.randn(T, D)
    chosen_TE = torch.rand(T, E) < 0.3
    whole_TD = ffn.sparse(x_TD, chosen_TE)
    for t in range(T):
        alone_1D = ffn.sparse(x_TD[t : t + 1], chosen_TE[t : t + 1])
        torch.testing.assert_close(alone_1D[0], whole_TD[t], atol=2e-6, rtol=1e-5)


def test_weights_may_change_after_packing() -> None:
    up, down = weights(64, 16, 8, torch.float32)
    ffn, linear = PackedExpertFFN(up, down, 8), PackedLinear(up)
    x_TD, chosen_TE = torch.randn(3, 64), torch.rand(3, 8) < 0.5
    before = ffn.dense(x_TD), ffn.sparse(x_TD, chosen_TE), linear(x_TD)
    up.zero_()
    down.zero_()
    after = ffn.dense(x_TD), ffn.sparse(x_TD, chosen_TE), linear(x_TD)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lead", [(1,), (13,), (2, 3), (70,)], ids=str)
@pytest.mark.parametrize("shape", [(300, 100), (7, 33), (128, 64)], ids=str)
def test_linear_matches_torch(
    path: str, shape: tuple[int, int], lead: tuple[int, ...], dtype: torch.dtype
) -> None:
    N, K = shape
    weight_NK = (torch.randn(N, K) / K**0.5).to(dtype)
    x = torch.randn(*lead, K).to(dtype)
    linear = PackedLinear(weight_NK)
    expected = x.float() @ weight_NK.float().t()
    assert_near(linear(x), expected, dtype)
    assert_near(linear(x, relu=True), expected.relu(), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_layers_widen_in_several_parts(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_linear, "_SCRATCH_ELEMENTS", 5000)
    for module in (cpu_ffn, cpu_linear):
        monkeypatch.setattr(module, "best_path", lambda _: "widen")
    up, down = weights(100, 24, 7, dtype)
    ffn = PackedExpertFFN(up, down, 7)
    x_TD, everyone = torch.randn(40, 100).to(dtype), torch.ones(40, 7, dtype=torch.bool)
    assert_near(ffn._gemm(x_TD, None), reference(x_TD, up, down, everyone), dtype)
    assert_near(PackedLinear(up)(x_TD), x_TD.float() @ up.float().t(), dtype)


def test_memory_held_is_reported() -> None:
    up, down = weights(64, 16, 8, torch.float32)
    assert PackedLinear(up).nbytes == up.nbytes
    assert PackedExpertFFN(up, down, 8).nbytes == 2 * (up.nbytes + down.nbytes)


def test_the_cost_rule_prefers_rows_for_few_groups_for_many_and_dense_for_all() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ffn = PackedExpertFFN(*weights(768, 96, 32, torch.float32), 32)
        assert ffn.sparse_way(T=1, P=6, U=6) == "rows"
        assert ffn.sparse_way(T=256, P=256 * 6, U=6) == "grouped"
        assert ffn.sparse_way(T=16, P=16 * 32, U=32) == "masked"
    finally:
        torch.set_num_threads(threads)


def test_bad_arguments_are_refused() -> None:
    up, down = weights(64, 16, 8, torch.float32)
    with pytest.raises(ValueError, match="must divide"):
        PackedExpertFFN(up, down, 7)
    with pytest.raises(ValueError, match="activation"):
        PackedExpertFFN(up, down, 8, "gelu")
    with pytest.raises(ValueError, match="one shape"):
        PackedExpertFFN(up, down[:-1], 8)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        PackedExpertFFN(up.double(), down.double(), 8)
    with pytest.raises(ValueError, match="matrix"):
        PackedLinear(up[0])
