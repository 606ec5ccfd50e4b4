"""The trainable many-token FFN: output and every gradient against autograd through slices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.gpu.ffn import product_blocks, products, training
from engine.gpu.ffn.training import ffn
from engine.gpu.routing.pairs import SortedPairs, sort_pairs_reference
from engine.gpu.routing.rule import choose_scores_reference
from engine.gpu.training import top_k_ffn
from engine.model.activations import activate_reference
from engine.model.ffn import ExpertFFN
from engine.model.policy_batch import PolicyBatch
from engine.model.sliced_ffn import sparse_ffn
from engine.model.trace import Trace
from engine.policy import ExpertPolicy
from tests.models import tiny_config

pytestmark = pytest.mark.usefixtures("poisoned")

RelativeError = Callable[[Tensor, Tensor], float]

# Activations, their gradients and each pair's result are rounded to the dtype on the way; on a GPU,
# three TF32 products come a little short of float32.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
NAMES = ("y", "x", "up", "down")


def leaves(
    tokens: int, width: int, neurons: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    x_TD, up_FD, down_FD = (
        torch.randn(rows, width, device=device).to(dtype).requires_grad_()
        for rows in (tokens, neurons, neurons)
    )
    return x_TD, up_FD, down_FD


def random_pairs(scores_TE: Tensor, max_k: int, *, exactly: bool = False) -> SortedPairs:
    """1 to max_k experts a token, or exactly max_k."""
    tokens, device = scores_TE.shape[0], scores_TE.device
    least = max_k if exactly else 1
    k_T = torch.randint(least, max_k + 1, (tokens,), dtype=torch.int32, device=device)
    mass_T = torch.full_like(scores_TE[:, 0], 2.0)
    return sort_pairs_reference(choose_scores_reference(scores_TE, k_T, mass_T, max_k))


def with_gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dy_TD: Tensor
) -> tuple[Tensor, ...]:
    """y and the gradients of every input."""
    y_TD = function(*inputs)
    gradients = torch.autograd.grad(y_TD, inputs, dy_TD.to(y_TD.dtype))
    return (y_TD.detach(), *gradients)


def by_slices(
    inputs: tuple[Tensor, ...], pairs: SortedPairs, activation: str, dy_TD: Tensor
) -> tuple[Tensor, ...]:
    """The reference in float64."""
    doubles = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    return with_gradients(
        lambda x, up, down: sparse_ffn(x, up, down, pairs.chosen_TE, activation), doubles, dy_TD
    )


def assert_near(
    actual: tuple[Tensor, ...],
    expected: tuple[Tensor, ...],
    limit: float,
    relative_error: RelativeError,
) -> None:
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert relative_error(a, e) < limit, name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("tokens", "width", "experts", "size", "max_k", "activation"),
    [
        (1, 100, 5, 12, 3, "relu"),
        (40, 100, 6, 24, 2, "relu2"),
        (30, 64, 16, 32, 8, "relu"),
        (20, 768, 3, 100, 2, "relu"),
        (150, 48, 2, 96, 2, "relu2"),
        (33, 136, 2, 192, 1, "relu"),
        (140, 32, 1, 264, 1, "relu2"),
        (5, 64, 20, 3, 12, "relu"),
    ],
)
def test_output_and_gradients_equal_the_reference(
    tokens: int,
    width: int,
    experts: int,
    size: int,
    max_k: int,
    activation: str,
    dtype: torch.dtype,
    device: torch.device,
    relative_error: RelativeError,
) -> None:
    inputs = leaves(tokens, width, experts * size, dtype, device)
    pairs = random_pairs(torch.randn(tokens, experts, device=device), max_k)
    dy_TD = torch.randn(tokens, width, device=device).to(dtype)
    actual = with_gradients(lambda x, up, down: ffn(x, up, down, pairs, activation), inputs, dy_TD)
    assert all(tensor.dtype == dtype for tensor in actual)
    expected = by_slices(inputs, pairs, activation, dy_TD)
    assert_near(actual, expected, TOLERANCE[dtype], relative_error)


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_all_experts_have_the_dense_gradients(
    activation: str, device: torch.device, relative_error: RelativeError
) -> None:
    inputs = leaves(17, 100, 6 * 20, torch.float32, device)
    pairs = random_pairs(torch.randn(17, 6, device=device), 6, exactly=True)
    dy_TD = torch.randn(17, 100, device=device)
    actual = with_gradients(lambda x, up, down: ffn(x, up, down, pairs, activation), inputs, dy_TD)
    doubles = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    dense = with_gradients(
        lambda x, up, down: activate_reference(x @ up.T, activation) @ down, doubles, dy_TD
    )
    assert_near(actual, dense, TOLERANCE[torch.float32], relative_error)


@pytest.mark.parametrize("max_k", [1, 2])
def test_experts_without_tokens_are_not_read_and_get_zeros(
    max_k: int, device: torch.device, relative_error: RelativeError
) -> None:
    """With max_k 1 every token goes to one expert."""
    inputs = leaves(150, 64, 8 * 16, torch.float32, device)
    scores_TE = torch.full((150, 8), -1e4, device=device)
    used = [2, 5][:max_k]
    scores_TE[:, used] = 1.0
    pairs = random_pairs(scores_TE, max_k)
    dy_TD = torch.randn(150, 64, device=device)
    expected = by_slices(inputs, pairs, "relu2", dy_TD)
    empty = torch.ones(8, dtype=torch.bool, device=device)
    empty[used] = False
    empty_F = empty.repeat_interleave(16)
    assert not pairs.counts_E[empty].any()
    with torch.no_grad():
        for weight_FD in inputs[1:]:
            weight_FD[empty_F] = torch.nan
    actual = with_gradients(lambda x, up, down: ffn(x, up, down, pairs, "relu2"), inputs, dy_TD)
    assert_near(actual, expected, TOLERANCE[torch.float32], relative_error)
    for gradient_FD in actual[2:]:
        assert torch.equal(gradient_FD[empty_F], torch.zeros_like(gradient_FD[empty_F]))


def test_sums_over_pairs_may_be_split(
    device: torch.device, relative_error: RelativeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product_blocks, "LEAST_PAIRS_PER_SPLIT", 8)
    assert product_blocks.weights_splits(2, 140) == 17
    inputs = leaves(140, 40, 2 * 16, torch.bfloat16, device)
    pairs = random_pairs(torch.randn(140, 2, device=device), 2)
    dy_TD = torch.randn(140, 40, device=device).bfloat16()
    actual = with_gradients(lambda x, up, down: ffn(x, up, down, pairs, "relu"), inputs, dy_TD)
    expected = by_slices(inputs, pairs, "relu", dy_TD)
    assert_near(actual, expected, TOLERANCE[torch.bfloat16], relative_error)


@pytest.mark.parametrize(("tiles", "columns"), [(1, 64), (300, 192), (5000, 768)])
def test_few_tiles_share_a_row_between_programs(tiles: int, columns: int) -> None:
    assert product_blocks.spread_columns(tiles, 768, 64) == columns


def test_tiles_cover_every_pair_once_in_turns_of_all_experts(device: torch.device) -> None:
    counts = [300, 0, 128, 129, 5]
    offsets_E1 = torch.tensor([0, 300, 300, 428, 557, 562], dtype=torch.int32, device=device)
    tiles = products.list_tiles(offsets_E1, 900).tolist()
    size = product_blocks.TILE_PAIRS
    expected = [
        [expert, int(offsets_E1[expert]) + n * size]
        for n in range(3)
        for expert, count in enumerate(counts)
        if count > n * size
    ]
    unused = tiles[len(expected) :]
    assert tiles[: len(expected)] == expected
    assert unused
    assert all(expert == -1 for expert, _ in unused)


def test_runs_repeat_bit_for_bit(device: torch.device) -> None:
    inputs = leaves(50, 64, 6 * 16, torch.bfloat16, device)
    pairs = random_pairs(torch.randn(50, 6, device=device), 3)
    dy_TD = torch.randn(50, 64, device=device).bfloat16()
    first, second = (
        with_gradients(lambda x, up, down: ffn(x, up, down, pairs, "relu2"), inputs, dy_TD)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_computes_in_its_dtype_and_keeps_the_masters(
    device: torch.device, relative_error: RelativeError
) -> None:
    x_TD, up_FD, down_FD = leaves(40, 64, 6 * 16, torch.float32, device)
    inputs = (x_TD.detach().bfloat16().requires_grad_(), up_FD, down_FD)
    pairs = random_pairs(torch.randn(40, 6, device=device), 3)
    dy_TD = torch.randn(40, 64, device=device)

    def autocast(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return ffn(x, up, down, pairs, "relu")

    actual = with_gradients(autocast, inputs, dy_TD)
    assert [t.dtype for t in actual] == [torch.bfloat16] * 2 + [torch.float32] * 2
    # Of weights as the products see them: rounding moves a neuron across ReLU's kink.
    rounded = tuple(tensor.bfloat16() for tensor in inputs)
    expected = by_slices(rounded, pairs, "relu", dy_TD.bfloat16())
    assert_near(actual, expected, TOLERANCE[torch.bfloat16], relative_error)
    assert autocast(x_TD, up_FD, down_FD).dtype == torch.bfloat16


class TestExpertFFN:
    """The layer takes the kernels on CUDA when it trains; here it is told that it may."""

    @pytest.fixture
    def ffn(self, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> ExpertFFN:
        ffn = ExpertFFN(tiny_config()).to(device)
        ffn.training_kernels = top_k_ffn
        for tensor in (ffn.up.data, ffn.down.data, ffn.router):
            tensor.normal_()
        monkeypatch.setattr(training, "supports", lambda x_TD, experts: True)
        return ffn

    def run(self, ffn: ExpertFFN, x_TD: Tensor, policy: ExpertPolicy) -> tuple[Tensor, Tensor]:
        trace = Trace()
        batch = PolicyBatch.uniform(policy, x_TD.shape[0], ffn.num_experts, x_TD.device)
        y_TD = ffn(x_TD, batch, trace)
        assert trace.chosen[0] is not None
        return y_TD, trace.chosen[0]

    def test_training_uses_them(self, ffn: ExpertFFN, relative_error: RelativeError) -> None:
        x_TD = torch.randn(30, ffn.up.shape[1], device=ffn.up.device, requires_grad=True)
        y_TD, chosen_TE = self.run(ffn, x_TD, ExpertPolicy.top_k(3))
        assert "sparse_ffn" in str(y_TD.grad_fn)
        best_TK = ffn.scores(x_TD).topk(3).indices
        assert torch.equal(chosen_TE, torch.zeros_like(chosen_TE).scatter(1, best_TK, True))
        dy_TD = torch.randn_like(y_TD)
        inputs = (x_TD, ffn.up, ffn.down)
        actual = (y_TD.detach(), *torch.autograd.grad(y_TD, inputs, dy_TD))
        expected = with_gradients(
            lambda x, up, down: sparse_ffn(x, up, down, chosen_TE, ffn.activation), inputs, dy_TD
        )
        assert_near(actual, expected, TOLERANCE[torch.float32], relative_error)

    def test_nothing_else_does(self, ffn: ExpertFFN, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("the training kernels were called")

        monkeypatch.setattr(training, "ffn", refuse)
        x_TD = torch.randn(5, ffn.up.shape[1], device=ffn.up.device)
        with torch.no_grad():
            self.run(ffn, x_TD, ExpertPolicy.top_k(3))
        self.run(ffn, x_TD, ExpertPolicy.mass(0.5))
        ffn.requires_grad_(False)
        self.run(ffn, x_TD, ExpertPolicy.top_k(3))
