"""The CPU's kernels against torch, and their promise: a token's bits do not depend on company."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.cpu import native
from engine.gpu.ffn.activations import hidden_reference
from engine.gpu.routing import rule
from engine.model.attention import rotate
from engine.model.rotary import rope_table
from engine.model.sliced_ffn import sparse_ffn_reference

pytestmark = pytest.mark.skipif(not native.available(), reason="needs a C compiler")

DTYPES = pytest.mark.parametrize("dtype", native.DTYPES, ids=["float32", "bfloat16"])
# Largest error relative to the largest result: sums of a few hundred numbers, rounded once.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest expected number, and no NaN."""
    error = (actual.double() - expected.double()).abs().max()
    assert error <= tolerance * expected.double().abs().max().clamp_min(1e-3)


def same_bits(compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` returns, with one thread as with two."""
    torch.set_num_threads(1)
    alone = compute()
    torch.set_num_threads(2)
    assert torch.equal(compute(), alone)
    return alone


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


# --- linear layers -------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize(
    ("N", "K"), [(64, 32), (50, 64), (200, 96), (16, 32), (3, 2), (1, 64), (65, 34), (320, 512)]
)
def test_linear_is_the_product_whatever_the_company(dtype: torch.dtype, N: int, K: int) -> None:
    weight_NK = random(N, K, dtype=dtype, scale=K**-0.5)
    linear = native.PackedLinear(weight_NK)
    for T in (1, 2, 7, 100, 200):
        x_TK = random(T, K, dtype=dtype)
        y_TN = same_bits(lambda x_TK=x_TK: linear(x_TK))  # type: ignore[misc]
        assert y_TN.dtype == dtype
        assert_near(y_TN, x_TK.double() @ weight_NK.double().T, TOLERANCE[dtype])
        for t in {0, T // 2, T - 1}:
            assert torch.equal(linear(x_TK[t : t + 1])[0], y_TN[t])


@DTYPES
@pytest.mark.parametrize(("N", "K"), [(64, 32), (50, 64), (3, 2), (65, 34)])
def test_linear_adds_its_bias(dtype: torch.dtype, N: int, K: int) -> None:
    weight_NK, bias_N = random(N, K, dtype=dtype, scale=K**-0.5), random(N, dtype=dtype, scale=3)
    linear = native.PackedLinear(weight_NK, bias_N)
    for T in (1, 7, 100):
        x_TK = random(T, K, dtype=dtype)
        y_TN = same_bits(lambda x_TK=x_TK: linear(x_TK))  # type: ignore[misc]
        expected_TN = x_TK.double() @ weight_NK.double().T + bias_N.double()
        assert_near(y_TN, expected_TN, TOLERANCE[dtype])
        assert torch.equal(linear(x_TK[-1:])[0], y_TN[-1])


@DTYPES
def test_a_packed_weight_gives_back_what_was_packed(dtype: torch.dtype) -> None:
    for N, K in ((64, 32), (50, 64), (3, 2), (97, 10)):
        weight_NK = random(N, K, dtype=dtype)
        linear = native.PackedLinear(weight_NK)
        assert torch.equal(native.unpack(linear.packed, N), weight_NK)
        ids_T = torch.randint(0, N, (9,))
        assert torch.equal(linear.rows(ids_T), weight_NK[ids_T])
        assert linear.rows(ids_T[:0]).shape == (0, K)


@DTYPES
def test_linear_takes_no_tokens_and_rows_far_apart(dtype: torch.dtype) -> None:
    linear = native.PackedLinear(weight_NK := random(40, 16, dtype=dtype))
    assert linear(torch.empty(0, 16, dtype=dtype)).shape == (0, 40)
    apart_TK = random(16, 5, dtype=dtype).T
    assert torch.equal(linear(apart_TK), linear(apart_TK.contiguous()))
    assert_near(linear(apart_TK), apart_TK.double() @ weight_NK.double().T, TOLERANCE[dtype])


@DTYPES
def test_linear_keeps_a_damaged_token_to_itself(dtype: torch.dtype) -> None:
    linear = native.PackedLinear(random(50, 64, dtype=dtype))
    x_TK = random(13, 64, dtype=dtype)
    good_TN = linear(x_TK)
    x_TK[4, 63] = torch.nan
    x_TK[7, 0] = torch.inf
    bad_TN = linear(x_TK)
    whole = [t for t in range(13) if t not in (4, 7)]
    assert torch.equal(bad_TN[whole], good_TN[whole])
    assert bad_TN[4].isnan().all()
    assert not bad_TN[7].isfinite().any()


# --- experts -------------------------------------------------------------------------------------

SHAPES = [(64, 8, 24), (32, 5, 7), (96, 4, 130), (64, 16, 8), (32, 6, 1), (160, 3, 33), (64, 1, 48)]


def make_ffn(
    D: int, E: int, S: int, dtype: torch.dtype, activation: str = "relu"
) -> tuple[native.PackedExpertFFN, Tensor, Tensor]:
    up_FD = random(E * S, D, dtype=dtype, scale=D**-0.5)
    down_FD = random(E * S, D, dtype=dtype, scale=(E * S) ** -0.5)
    return native.PackedExpertFFN(up_FD, down_FD, E, activation), up_FD, down_FD


def expected_ffn(
    x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, chosen_TE: Tensor, activation: str
) -> Tensor:
    x_TD, up_FD, down_FD = x_TD.double(), up_FD.double(), down_FD.double()
    return sparse_ffn_reference(x_TD, up_FD, down_FD, chosen_TE, activation)


def every_expert(T: int, E: int) -> Tensor:
    return torch.ones(T, E, dtype=torch.bool)


@DTYPES
@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize(("D", "E", "S"), SHAPES)
def test_experts_are_the_dense_ffn_without_the_others(
    dtype: torch.dtype, activation: str, D: int, E: int, S: int
) -> None:
    """Few tokens an expert, some, and many; random choices, so that some token has no expert."""
    ffn, up_FD, down_FD = make_ffn(D, E, S, dtype, activation)
    for T in (1, 2, 5, 19, 70):
        x_TD, chosen_TE = random(T, D, dtype=dtype), torch.rand(T, E) < 0.4
        pairs = native.sort_pairs(chosen_TE)
        y_TD = same_bits(lambda x_TD=x_TD, pairs=pairs: ffn(x_TD, pairs))  # type: ignore[misc]
        assert_near(
            y_TD, expected_ffn(x_TD, up_FD, down_FD, chosen_TE, activation), TOLERANCE[dtype]
        )
        for t in range(T):
            alone = ffn(x_TD[t : t + 1], native.sort_pairs(chosen_TE[t : t + 1]))
            assert torch.equal(alone[0], y_TD[t])


@DTYPES
@pytest.mark.parametrize("options", ["gate, relu", "biases, relu2", "gate, fatrelu", "gate, drelu"])
@pytest.mark.parametrize(("D", "E", "S"), SHAPES)
def test_experts_with_gates_and_biases(
    dtype: torch.dtype, options: str, D: int, E: int, S: int
) -> None:
    what, activation = options.split(", ")
    up_FD = random(E * S, D, dtype=dtype, scale=D**-0.5)
    down_FD = random(E * S, D, dtype=dtype, scale=(E * S) ** -0.5)
    gate_FD = random(E * S, D, dtype=dtype, scale=D**-0.5) if what == "gate" else None
    up_bias_F = random(E * S, dtype=dtype) if what == "biases" else None
    down_bias_D = random(D, dtype=dtype) if what == "biases" else None
    threshold = 0.0
    if activation == "fatrelu":  # whole numbers: rounding takes none to the threshold's other side
        gate_FD, threshold = torch.randint(-1, 2, (E * S, D)).to(dtype), 1.5
    extras = native.FFNExtras(gate_FD, up_bias_F, down_bias_D, threshold)
    ffn = native.PackedExpertFFN(up_FD, down_FD, E, activation, extras)
    for T in (1, 5, 19, 70):
        x_TD, chosen_TE = random(T, D, dtype=dtype), torch.rand(T, E) < 0.4
        x_TD = x_TD.sign() if threshold else x_TD
        h_TF = hidden_reference(x_TD.double(), up_FD, activation, gate_FD, up_bias_F, threshold)
        assert_near(ffn.hidden(x_TD), h_TF, 2 * TOLERANCE[dtype])
        expected_TD = (h_TF * chosen_TE.repeat_interleave(S, 1)) @ down_FD.double()
        if down_bias_D is not None:
            expected_TD = expected_TD + down_bias_D.double()
        pairs = native.sort_pairs(chosen_TE)
        y_TD = same_bits(lambda x_TD=x_TD, pairs=pairs: ffn(x_TD, pairs))  # type: ignore[misc]
        assert_near(y_TD, expected_TD, 2 * TOLERANCE[dtype])
        for t in range(T):
            alone = ffn(x_TD[t : t + 1], native.sort_pairs(chosen_TE[t : t + 1]))
            assert torch.equal(alone[0], y_TD[t])


@DTYPES
@pytest.mark.parametrize(("D", "E", "S"), SHAPES)
def test_the_activations_of_all_experts(dtype: torch.dtype, D: int, E: int, S: int) -> None:
    ffn, up_FD, _ = make_ffn(D, E, S, dtype)
    for T in (1, 3, 8):
        x_TD = random(T, D, dtype=dtype)
        expected_TF = (x_TD.double() @ up_FD.double().T).relu()
        assert ffn.hidden(x_TD).shape == (T, E * S)
        assert_near(ffn.hidden(x_TD), expected_TF, TOLERANCE[dtype])


@DTYPES
def test_one_expert_may_have_many_tokens_while_most_have_one(dtype: torch.dtype) -> None:
    ffn, up_FD, down_FD = make_ffn(64, 40, 24, dtype)
    chosen_TE = torch.eye(40, dtype=torch.bool)
    chosen_TE[:30, 0] = True
    x_TD = random(40, 64, dtype=dtype)
    expected_TD = expected_ffn(x_TD, up_FD, down_FD, chosen_TE, "relu")
    assert_near(ffn(x_TD, native.sort_pairs(chosen_TE)), expected_TD, TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize(("D", "E", "S"), SHAPES)
def test_every_expert_is_the_dense_ffn(dtype: torch.dtype, D: int, E: int, S: int) -> None:
    ffn, up_FD, down_FD = make_ffn(D, E, S, dtype)
    for T in (1, 2, 3, 17, 18, 40):
        x_TD = random(T, D, dtype=dtype)
        dense_TD = ffn(x_TD, native.every_pair(T, E))
        assert torch.equal(ffn(x_TD, native.sort_pairs(every_expert(T, E))), dense_TD)
        expected = expected_ffn(x_TD, up_FD, down_FD, every_expert(T, E), "relu")
        assert_near(dense_TD, expected, TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("S", [7, 24])
def test_one_token_is_the_same_beside_few_some_and_many(dtype: torch.dtype, S: int) -> None:
    """One expert's 1, 2, 3 and 18 pairs are computed in different ways: all to the same bits."""
    ffn, *_ = make_ffn(64, 2, S, dtype)
    x_TD = random(40, 64, dtype=dtype)
    alone_D = ffn(x_TD[:1], native.every_pair(1, 2))[0]
    for T in (2, 3, 6, 7, 17, 18, 19, 40):
        assert torch.equal(ffn(x_TD[:T], native.every_pair(T, 2))[0], alone_D)
        assert torch.equal(ffn(x_TD[:T].flip(0), native.every_pair(T, 2))[-1], alone_D)


@DTYPES
@pytest.mark.parametrize("scale", [1e-19, 1e-30])
def test_vanishing_activations_are_the_same_in_any_company(
    dtype: torch.dtype, scale: float
) -> None:
    """Products below the smallest normal number vanish on every path, or on none."""
    ffn, *_ = make_ffn(64, 1, 8, dtype, "relu2")
    x_TD = random(40, 64, dtype=dtype, scale=scale)
    y_TD = ffn(x_TD, native.every_pair(40, 1))
    for t in range(40):
        assert torch.equal(ffn(x_TD[t : t + 1], native.every_pair(1, 1))[0], y_TD[t])


@DTYPES
@pytest.mark.parametrize("gated", [False, True])
def test_weights_of_silent_neurons_are_not_read(dtype: torch.dtype, gated: bool) -> None:
    """Also where a closed gate times a negative number is -0.0: NaN there does not show."""
    up_FD, down_FD = random(32, 64, dtype=dtype), random(32, 64, dtype=dtype)
    first_FD = -torch.ones(32, 64, dtype=dtype)
    first_FD[:4] = 1.0
    down_FD[4:] = torch.nan
    extras = native.FFNExtras(gate_FD=first_FD) if gated else None
    ffn = native.PackedExpertFFN(up_FD if gated else first_FD, down_FD, 1, "relu", extras)
    x_TD = torch.rand(1, 64).to(dtype)
    assert ffn(x_TD, native.every_pair(1, 1)).isfinite().all()
    assert ffn(x_TD.expand(2, -1), native.every_pair(2, 1)).isnan().all()  # read for two


@DTYPES
def test_no_tokens_and_no_experts(dtype: torch.dtype) -> None:
    ffn, *_ = make_ffn(32, 4, 8, dtype)
    nobody = torch.empty(0, 32, dtype=dtype)
    assert ffn(nobody, native.every_pair(0, 4)).shape == (0, 32)
    assert ffn(nobody, native.sort_pairs(every_expert(0, 4))).shape == (0, 32)
    none_TE = torch.zeros(3, 4, dtype=torch.bool)
    out_TD = ffn(random(3, 32, dtype=dtype), native.sort_pairs(none_TE))
    assert torch.equal(out_TD, torch.zeros(3, 32, dtype=dtype))


@DTYPES
@pytest.mark.parametrize("S", [7, 8])
@pytest.mark.parametrize("T", [2, 6, 40])
def test_experts_keep_a_damaged_token_to_itself(dtype: torch.dtype, S: int, T: int) -> None:
    ffn, *_ = make_ffn(32, 3, S, dtype)
    x_TD = random(T, 32, dtype=dtype)
    good_TD = ffn(x_TD, native.every_pair(T, 3))
    x_TD[1, 5] = torch.nan
    bad_TD = ffn(x_TD, native.every_pair(T, 3))
    whole = [t for t in range(T) if t != 1]
    assert torch.equal(bad_TD[whole], good_TD[whole])
    assert bad_TD[1].isnan().all()


def test_working_memory_of_another_call_does_not_show() -> None:
    """An odd number of neurons is padded: what was left in freed memory must not be read."""
    torch.set_num_threads(1)  # so that memory freed here is found again
    D, T = 64, 40
    x_TD = torch.randn(T, D)
    for S in (7, 33, 129):
        ffn, *_ = make_ffn(D, 1, S, torch.float32)
        expected_TD = torch.cat([ffn(x_D[None], native.every_pair(1, 1)) for x_D in x_TD])
        for _ in range(3):
            leave_nan_in_freed_memory((S + 1) * D * 4)
            assert torch.equal(ffn(x_TD, native.every_pair(T, 1)), expected_TD)


def leave_nan_in_freed_memory(size: int, pieces: int = 16) -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    held = [libc.malloc(size) for _ in range(pieces)]
    for piece in held:
        ctypes.memset(piece, 0xFF, size)
    for piece in held:
        libc.free(piece)


# --- the choice of experts -----------------------------------------------------------------------


def limits(k: list[int], mass: list[float]) -> tuple[Tensor, Tensor]:
    return torch.tensor(k, dtype=torch.int32), torch.tensor(mass)


@DTYPES
@pytest.mark.parametrize(("T", "E", "D"), [(5, 7, 10), (40, 32, 64), (3, 1, 32), (300, 64, 33)])
def test_choice_follows_the_rule(dtype: torch.dtype, T: int, E: int, D: int) -> None:
    """Scores are small integers, exact in any order of additions: ties, and no rounding."""
    x_TD = torch.randint(-2, 3, (T, D)).to(dtype)
    router_ED = torch.randint(-1, 2, (E, D)).float()
    k_T = torch.randint(1, E + 1, (T,), dtype=torch.int32)
    k_T[0] = E
    mass_T = (torch.rand(T) * 0.98 + 0.01).float()
    mass_T[::2] = 2.0
    chosen_TE = native.choose(x_TD, router_ED, k_T, mass_T)
    expected_TE = rule.choose_reference(x_TD.float() @ router_ED.T, k_T, mass_T)
    assert torch.equal(chosen_TE[::2], expected_TE[::2])
    # A sum of shares may fall on either side of a mass that it all but equals.
    assert ((chosen_TE != expected_TE).sum(1) <= 1).all()
    assert (chosen_TE != expected_TE).float().mean() < 0.01
    for t in range(T):
        row = slice(t, t + 1)
        alone = native.choose(x_TD[row], router_ED, k_T[row], mass_T[row])
        assert torch.equal(alone[0], chosen_TE[t])


def test_mass_takes_the_fewest_experts_that_suffice() -> None:
    """Shares of about 0.64, 0.24, 0.09, 0.03: each mass ends at its own rank."""
    router_ED = torch.tensor([[1.0, 0], [3, 0], [0, 0], [2, 0]])
    x_TD = torch.tensor([[1.0, 0]]).repeat(6, 1)
    mass = [0.0, 0.6, 0.7, 0.9, 0.99, 1.0]
    chosen_TE = native.choose(x_TD, router_ED, *limits([4, 4, 4, 4, 4, 2], mass))
    ranked = chosen_TE[:, [1, 3, 0, 2]].int()
    assert ranked.sum(1).tolist() == [1, 1, 2, 3, 4, 2]
    assert torch.equal(ranked, ranked.sort(1, descending=True).values)


def test_ties_go_to_the_lower_index() -> None:
    x_TD, router_ED = torch.ones(2, 16), torch.ones(9, 16)
    chosen_TE = native.choose(x_TD, router_ED, *limits([3, 9], [2.0, 0.5]))
    assert chosen_TE.int().tolist() == [[1] * 3 + [0] * 6, [1] * 5 + [0] * 4]


@DTYPES
def test_scores_that_are_not_numbers_come_last(dtype: torch.dtype) -> None:
    x_TD = random(4, 32, dtype=dtype)
    router_ED = torch.randn(6, 32)
    router_ED[2] = torch.nan
    x_TD[3] = torch.nan
    k_T, mass_T = limits([5, 6, 6, 3], [2.0, 2.0, 0.999999, 2.0])
    chosen_TE = native.choose(x_TD, router_ED, k_T, mass_T)
    assert torch.equal(chosen_TE, rule.choose_reference(x_TD.float() @ router_ED.T, k_T, mass_T))
    assert chosen_TE[:, 2].tolist() == [False, True, False, False]
    assert chosen_TE[3].tolist() == [True, False, False, False, False, False]


def test_pairs_are_sorted_by_expert_and_then_by_token() -> None:
    for T, E in ((1, 1), (5, 7), (60, 12), (9, 3)):
        chosen_TE = torch.rand(T, E) < 0.4
        chosen_TE[:, E // 2] = False  # an expert without tokens is not in use
        pairs = native.sort_pairs(chosen_TE)
        expert_P, token_P = chosen_TE.T.nonzero().unbind(1)
        used_U, counts_U = expert_P.unique(return_counts=True)
        assert pairs.used == len(used_U)
        assert pairs.count == len(expert_P)
        assert pairs.expert_U[: pairs.used].tolist() == used_U.tolist()
        assert pairs.offsets[: pairs.used + 1].tolist() == [0, *counts_U.cumsum(0).tolist()]
        assert pairs.token_P[: pairs.count].tolist() == token_P.tolist()


# --- the steps between ---------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("T", [0, 1, 7, 400])
def test_rms_norm(dtype: torch.dtype, T: int) -> None:
    x_TD, weight_D = random(T, 96, dtype=dtype), torch.rand(96).to(dtype)
    before_TD = x_TD.clone()
    out_TD = same_bits(lambda: native.rms_norm(x_TD, None, weight_D, 1e-5))
    assert torch.equal(x_TD, before_TD)
    if T:
        expected = F.rms_norm(x_TD.double(), (96,), weight_D.double(), 1e-5)
        assert_near(out_TD, expected, TOLERANCE[dtype])


@DTYPES
def test_rms_norm_adds_in_place_first(dtype: torch.dtype) -> None:
    x_TD, delta_TD = random(7, 96, dtype=dtype), random(7, 96, dtype=dtype)
    weight_D, sum_TD = torch.rand(96).to(dtype), x_TD + delta_TD
    out_TD = native.rms_norm(x_TD, delta_TD, weight_D, 1e-5)
    assert torch.equal(x_TD, sum_TD)
    assert torch.equal(out_TD, native.rms_norm(sum_TD, None, weight_D, 1e-5))


@DTYPES
@pytest.mark.parametrize("T", [0, 1, 7, 400])
def test_layer_norm_of_the_sum(dtype: torch.dtype, T: int) -> None:
    x_TD = random(T, 96, dtype=dtype) + 5
    delta_TD, weight_D, bias_D = (random(*s, dtype=dtype) for s in ((T, 96), (96,), (96,)))
    sum_TD = x_TD + delta_TD
    alone_TD = native.layer_norm(sum_TD.clone(), None, weight_D, bias_D, 1e-5)
    out_TD = native.layer_norm(x_TD, delta_TD, weight_D, bias_D, 1e-5)
    assert torch.equal(x_TD, sum_TD)
    assert torch.equal(out_TD, alone_TD)
    if T:
        wide = (sum_TD.double(), weight_D.double(), bias_D.double())
        assert_near(out_TD, F.layer_norm(wide[0], (96,), *wide[1:], 1e-5), TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize(("T", "heads", "d"), [(7, 4, 32), (1, 1, 64), (90, 9, 96)])
def test_rotation_turns_its_own_heads_alone(dtype: torch.dtype, T: int, heads: int, d: int) -> None:
    cos, sin = rope_table(T + 5, d, 1e4)
    cos_Td, sin_Td = cos[5:], sin[5:]
    x_THd = random(T, heads + 2, d, dtype=dtype)
    before = x_THd.clone()
    turned = native.rotate_(x_THd[:, :heads], cos_Td, sin_Td)
    assert turned.data_ptr() == x_THd.data_ptr()
    assert_near(turned, rotate(before[:, :heads].double(), cos_Td, sin_Td), TOLERANCE[dtype])
    assert torch.equal(x_THd[:, heads:], before[:, heads:])
    alone = native.rotate_(before[-1:, :heads], cos_Td[-1:], sin_Td[-1:])
    assert torch.equal(alone[0], x_THd[-1, :heads])


# --- attention -----------------------------------------------------------------------------------

BLOCK = native.KV_BLOCK
ROWS_AND_CONTEXTS = [(1, 37), (20, 20), (9, 50), (1, 1), (1, 16), (16, 16), (3, 17), (2, 64)]


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Sequences:
    """Sequences of (rows in the batch, tokens of context) in a cache, in scattered blocks."""

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        G: int,
        d: int,
        dtype: torch.dtype,
        layers: int = 2,
        window: int = 0,
    ) -> None:
        most = max(-(-context // BLOCK) for _, context in lengths)
        blocks = len(lengths) * most
        self.cache = native.PagedCache(layers, blocks * BLOCK, G, d, dtype, window)
        self.table_BM = torch.randperm(blocks).view(len(lengths), most).int()
        self.lengths = lengths
        self.keys = [random(context, G, d, dtype=dtype) for _, context in lengths]
        self.values = [random(context, G, d, dtype=dtype) for _, context in lengths]

    def store(self, layer: int) -> None:
        for sequence, (_, context) in enumerate(self.lengths):
            position = torch.arange(context)
            block = self.table_BM[sequence].long()[position // BLOCK]
            slot_T = block * BLOCK + position % BLOCK
            self.cache.store(layer, slot_T, self.keys[sequence], self.values[sequence])

    def attend(self, layer: int, q_THd: Tensor) -> Tensor:
        rows, context = (ints(list(numbers)) for numbers in zip(*self.lengths, strict=True))
        first = rows.cumsum(0).int() - rows
        return self.cache.attend(layer, q_THd, self.table_BM, first, rows, context)

    def attend_alone(self, layer: int, q_Hd: Tensor, sequence: int, context: int) -> Tensor:
        """One row, as if it were decoded by itself."""
        row = slice(sequence, sequence + 1)
        out_1Hd = self.cache.attend(
            layer, q_Hd[None], self.table_BM[row], ints([0]), ints([1]), ints([context])
        )
        return out_1Hd[0]

    def expected(self, q_THd: Tensor) -> list[Tensor]:
        """Of each sequence, by torch in float64."""
        outputs = []
        queries = q_THd.double().split([rows for rows, _ in self.lengths])
        for q_RHd, k_CGd, v_CGd, (rows, context) in zip(
            queries, self.keys, self.values, self.lengths, strict=True
        ):
            mask_RC = torch.ones(rows, context, dtype=torch.bool).tril(context - rows)
            if self.cache.window:
                mask_RC = mask_RC.triu(context - rows - self.cache.window + 1)
            q, k, v = (x.double().transpose(0, 1)[None] for x in (q_RHd, k_CGd, v_CGd))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_RC, enable_gqa=True)
            outputs.append(out[0].transpose(0, 1))
        return outputs


@DTYPES
@pytest.mark.parametrize("window", [0, 1, 16, 37])
@pytest.mark.parametrize(("G", "H", "d"), [(2, 4, 32), (3, 3, 64), (1, 8, 128), (2, 14, 96)])
def test_attention_is_causal_attention_whatever_the_company(
    dtype: torch.dtype, G: int, H: int, d: int, window: int
) -> None:
    """Chunks and single rows, contexts at the edges of blocks, blocks in any order."""
    sequences = Sequences(ROWS_AND_CONTEXTS, G, d, dtype, window=window)
    sequences.store(1)
    q_THd = random(sum(rows for rows, _ in ROWS_AND_CONTEXTS), H, d, dtype=dtype)
    out_THd = same_bits(lambda: sequences.attend(1, q_THd))
    assert out_THd.dtype == dtype
    assert_near(out_THd, torch.cat(sequences.expected(q_THd)), TOLERANCE[dtype])
    t = 0
    for sequence, (rows, context) in enumerate(ROWS_AND_CONTEXTS):
        for row in range(rows):
            alone_Hd = sequences.attend_alone(1, q_THd[t], sequence, context - rows + 1 + row)
            assert torch.equal(alone_Hd, out_THd[t])
            t += 1


@DTYPES
def test_each_layer_has_its_own_cache_and_rows_may_lie_apart(dtype: torch.dtype) -> None:
    """Queries, keys and values are slices of one product's rows, as the model passes them."""
    sequences = Sequences([(5, 5)], 2, 32, dtype)
    heads_THd = random(5, 4 + 2 + 2, 32, dtype=dtype)
    q_THd, k_TGd, v_TGd = heads_THd.split([4, 2, 2], dim=1)
    sequences.keys, sequences.values = [k_TGd], [v_TGd]
    sequences.store(0)
    assert_near(sequences.attend(0, q_THd), sequences.expected(q_THd)[0], TOLERANCE[dtype])
    assert (sequences.cache.keys[1] == 0).all()
    assert (sequences.cache.values[1] == 0).all()


@DTYPES
@pytest.mark.parametrize("large", [1.0, 30.0, 1e4])
def test_attention_of_large_scores(dtype: torch.dtype, large: float) -> None:
    sequences = Sequences([(3, 40), (1, 33)], 1, 32, dtype)
    sequences.store(0)
    q_THd = random(4, 2, 32, dtype=dtype, scale=large)
    expected = torch.cat(sequences.expected(q_THd))
    assert_near(sequences.attend(0, q_THd), expected, 10 * TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
def test_what_an_earlier_request_left_in_a_block_does_not_leak(
    dtype: torch.dtype, damage: float
) -> None:
    """Damaged: every slot beyond the context, the next of a pair and the block's rest included."""
    for context in (1, 2, 3, 15, 16, 17, 31, 33):
        for rows in {1, min(context, 5), context}:
            sequences = Sequences([(rows, context), (2, 47)], 2, 32, dtype)
            q_THd = random(rows + 2, 4, 32, dtype=dtype)
            sequences.store(0)
            clean_THd = sequences.attend(0, q_THd)
            sequences.cache.keys.fill_(damage)
            sequences.cache.values.fill_(damage)
            sequences.store(0)
            assert torch.equal(sequences.attend(0, q_THd), clean_THd)


@DTYPES
def test_attention_keeps_a_damaged_query_and_sequence_to_itself(dtype: torch.dtype) -> None:
    sequences = Sequences([(6, 20), (6, 20)], 2, 32, dtype)
    sequences.store(0)
    q_THd = random(12, 4, 32, dtype=dtype)
    clean_THd = sequences.attend(0, q_THd)
    q_THd[2] = torch.nan
    sequences.keys[1][0], sequences.values[1][0] = torch.nan, torch.nan
    sequences.store(0)
    out_THd = sequences.attend(0, q_THd)
    whole = [0, 1, 3, 4, 5]
    assert torch.equal(out_THd[whole], clean_THd[whole])
    assert out_THd[2].isnan().all()
    assert out_THd[6:].isnan().all()


@DTYPES
def test_a_later_token_of_the_chunk_does_not_reach_an_earlier_one(dtype: torch.dtype) -> None:
    """Not even if it is not a number: a chunk is as causal as token by token."""
    sequences = Sequences([(6, 20)], 1, 32, dtype)
    sequences.store(0)
    q_THd = random(6, 2, 32, dtype=dtype)
    clean_THd = sequences.attend(0, q_THd)
    sequences.keys[0][17], sequences.values[0][17] = torch.nan, torch.nan
    sequences.store(0)
    out_THd = sequences.attend(0, q_THd)
    assert torch.equal(out_THd[:3], clean_THd[:3])
    assert out_THd[3:].isnan().all()


# --- where they run ------------------------------------------------------------------------------


def test_only_types_and_shapes_of_full_vectors_are_supported() -> None:
    assert native.supports(torch.bfloat16, 96, 32)
    assert not native.supports(torch.float16, 96, 32)
    assert not native.supports(torch.float32, 96, 8)
    assert not native.supports(torch.float32, 80, 32)
