"""The choice that looks at the batch: a plain statement of the rule, and every implementation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.cpu import native
from engine.gpu.routing import routing, sharing

needs_kernels = pytest.mark.skipif(not native.available(), reason="needs a C compiler")

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 40), st.integers(0, 1 << 30))


def make_batch(tokens: int, experts: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, what each token takes in any case, and the k of those that share."""
    generator = torch.Generator().manual_seed(seed)
    scores_TE = 2 * torch.randn(tokens, experts, generator=generator)
    k_T = torch.randint(1, experts + 1, (tokens,), generator=generator, dtype=torch.int32)
    shared_T = k_T * torch.randint(0, 2, (tokens,), generator=generator, dtype=torch.int32)
    return scores_TE, torch.where(shared_T > 0, (k_T + 1) // 2, k_T), shared_T


def own(scores_TE: Tensor, k_T: Tensor) -> Tensor:
    return routing.choose_reference(scores_TE, k_T, torch.full(k_T.shape, 2.0))


def share_plainly(
    scores: list[list[float]], taken: list[set[int]], ks: list[int]
) -> list[set[int]]:
    """The rule, a token and an expert at a time."""
    read = set().union(*taken)
    needed: set[int] = set()
    for row, k in zip(scores, ks, strict=True):
        order = sorted(range(len(row)), key=lambda e: -row[e])
        riders = [e for e in order[k:] if e in read][: k // 2]
        spare = math.fsum(math.exp(row[e]) for e in riders)
        missing = [e for e in order[:k] if e not in read]
        while missing and math.fsum(math.exp(row[e]) for e in missing) > spare:
            needed.add(missing.pop(0))
    found = []
    for row, mine, k in zip(scores, taken, ks, strict=True):
        order = sorted(range(len(row)), key=lambda e: -row[e])
        usable = [e for e in order if e in read | needed]
        found.append(set(usable[: k + k // 2]) if k else mine)
    return found


def as_sets(chosen_TE: Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in chosen_TE]


@given(SHAPES)
def test_the_reference_is_the_rule(shape: tuple[int, int, int]) -> None:
    scores_TE, kept_T, shared_T = make_batch(*shape)
    taken_TE = own(scores_TE, kept_T)
    expected = share_plainly(scores_TE.tolist(), as_sets(taken_TE), shared_T.tolist())
    assert as_sets(sharing.share_reference(scores_TE, taken_TE, shared_T)) == expected


@given(SHAPES)
def test_nothing_more_is_read_and_no_token_holds_less_mass(shape: tuple[int, int, int]) -> None:
    """Compared with everyone's own top k."""
    scores_TE, kept_T, shared_T = make_batch(*shape)
    own_TE = own(scores_TE, torch.where(shared_T > 0, shared_T, kept_T))
    used_TE = sharing.share_reference(scores_TE, own(scores_TE, kept_T), shared_T)
    assert not (used_TE.any(0) & ~own_TE.any(0)).any()
    shares_TE = scores_TE.softmax(1)
    mass_T, own_mass_T = (shares_TE * used_TE).sum(1), (shares_TE * own_TE).sum(1)
    assert (mass_T >= own_mass_T - 1e-5).all()
    assert torch.equal(used_TE[shared_T == 0], own_TE[shared_T == 0])
    for k, used in zip(shared_T.tolist(), used_TE.sum(1).tolist(), strict=True):
        assert not k or used <= sharing.most(k, shape[1])


@given(st.integers(1, 40), st.integers(0, 1 << 30))
def test_a_token_among_its_like_uses_its_own_top_k(experts: int, seed: int) -> None:
    scores_TE, _, _ = make_batch(1, experts, seed)
    for k in range(1, experts + 1):
        k_T = torch.tensor([k], dtype=torch.int32)
        for copies in (1, 3):
            scores_CE, k_C = scores_TE.expand(copies, -1), k_T.expand(copies)
            taken_CE = own(scores_CE, (k_C + 1) // 2)
            used_CE = sharing.share_reference(scores_CE, taken_CE, k_C)
            assert torch.equal(used_CE, own(scores_CE, k_C))


def test_batches_side_by_side_do_not_see_each_other() -> None:
    batches = [make_batch(5, 12, seed) for seed in range(4)]
    scores, taken, ks = (
        torch.stack(parts)
        for parts in zip(*((s, own(s, kept), k) for s, kept, k in batches), strict=True)
    )
    together = sharing.share_reference(scores, taken, ks)
    for i in range(4):
        assert torch.equal(together[i], sharing.share_reference(scores[i], taken[i], ks[i]))


# --- the processor's ------------------------------------------------------------------------------


@needs_kernels
@given(SHAPES, st.sampled_from(native.DTYPES))
def test_native_equals_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The router picks single inputs out, so both sides see the same scores."""
    scores_TE, kept_T, shared_T = make_batch(*shape)
    x_TD, router_ED = scores_TE.to(dtype), torch.eye(shape[1])
    mass_T = torch.full(kept_T.shape, 2.0)
    chosen_TE = native.choose(x_TD, router_ED, kept_T, mass_T, shared_T)
    scores_TE = x_TD.float()  # rounded: with ties
    expected_TE = sharing.share_reference(scores_TE, own(scores_TE, kept_T), shared_T)
    if dtype == torch.float32:
        assert torch.equal(chosen_TE, expected_TE)
    else:  # where masses are equal, the order of additions decides
        assert (chosen_TE != expected_TE).sum() <= 2


@needs_kernels
def test_native_scores_that_are_not_numbers_share_nothing() -> None:
    scores_TE = damaged()
    k_T, limit_T = torch.full((5,), 4, dtype=torch.int32), torch.full((5,), 2.0)
    router_ED = torch.eye(6)
    router_ED[2, 2] = torch.nan  # one column
    whole_TE = torch.where(
        scores_TE.isnan().all(1, keepdim=True), scores_TE, scores_TE.nan_to_num()
    )
    chosen_TE = native.choose(whole_TE, router_ED, (k_T + 1) // 2, limit_T, k_T)
    seen_TE = whole_TE @ router_ED.T
    expected_TE = sharing.share_reference(seen_TE, own(seen_TE, (k_T + 1) // 2), k_T)
    assert torch.equal(chosen_TE, expected_TE)


def damaged() -> Tensor:
    scores_TE = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    scores_TE[0] = torch.nan
    scores_TE[1, 2] = torch.nan
    scores_TE[2, 3] = -torch.inf
    scores_TE[3] = -torch.inf
    return scores_TE


# --- the GPU's ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("tokens", "experts", "seed"), [(1, 1, 0), (1, 9, 1), (7, 33, 2), (16, 64, 3), (5, 100, 4)]
)
def test_share_equals_the_reference(
    tokens: int, experts: int, seed: int, device: torch.device
) -> None:
    scores_TE, kept_T, shared_T = (t.to(device) for t in make_batch(tokens, experts, seed))
    limits = kept_T, torch.full((tokens,), 2.0, device=device)
    most = [sharing.most(k, experts) for k in shared_T.tolist()]
    max_k = max(*kept_T.tolist(), *most)
    found = sharing.share(scores_TE, routing.select_scores(scores_TE, *limits, max_k), shared_T)
    expected_TE = sharing.share_reference(
        scores_TE, routing.choose_reference(scores_TE, *limits), shared_T
    )
    assert torch.equal(found.chosen_TE, expected_TE)
    for ids, row in zip(found.ids_TK.tolist(), as_sets(expected_TE), strict=True):
        assert ids == sorted(row) + [-1] * (max_k - len(row))


@pytest.mark.usefixtures("poisoned")
def test_select_shares_by_the_scores_of_the_router(device: torch.device) -> None:
    """Small integers are exact in any order of summation."""
    x_TD = torch.randint(-2, 3, (9, 300), device=device).float()
    router_ED = torch.randint(-2, 3, (24, 300), device=device) / 64
    _, kept_T, shared_T = (t.to(device) for t in make_batch(9, 24, 7))
    mass_T = torch.full((9,), 2.0, device=device)
    found = sharing.select(x_TD, router_ED, kept_T, mass_T, shared_T, 24)
    scores_TE = x_TD @ router_ED.T
    taken_TE = routing.choose_reference(scores_TE, kept_T, mass_T)
    assert torch.equal(found.chosen_TE, sharing.share_reference(scores_TE, taken_TE, shared_T))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_damaged_scores_share_nothing(device: torch.device) -> None:
    scores_TE = damaged().to(device)
    k_T = torch.full((5,), 4, dtype=torch.int32, device=device)
    limits = (k_T + 1) // 2, torch.full((5,), 2.0, device=device)
    choice = routing.select_scores(scores_TE, *limits, 6)
    found = sharing.share(scores_TE, choice, k_T)
    taken_TE = routing.choose_reference(scores_TE, *limits)
    assert torch.equal(found.chosen_TE, sharing.share_reference(scores_TE, taken_TE, k_T))
    for row in (0, 3):
        assert torch.equal(found.chosen_TE[row], taken_TE[row])
