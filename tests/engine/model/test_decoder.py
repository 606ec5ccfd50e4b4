"""The decoder: causality, grouped-query attention, rotary positions, packed equals plain."""

from __future__ import annotations

import copy

import pytest
import torch

from engine.model.attention import rotate
from engine.model.decoder import Decoder, generate
from engine.model.rotary import rope_table
from engine.policy import ExpertPolicy
from tests.engine.conftest import tiny_config, tiny_model

POLICIES = [ExpertPolicy.dense(), ExpertPolicy.top_k(3), ExpertPolicy.mass(0.7)]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_later_token_changes_nothing_before_it(reference: Decoder, policy: ExpertPolicy) -> None:
    ids = torch.randint(0, 300, (1, 20), generator=torch.Generator().manual_seed(2))
    changed = ids.clone()
    changed[0, 15] = (changed[0, 15] + 1) % 300
    before, after = reference.logits(ids, policy), reference.logits(changed, policy)
    torch.testing.assert_close(before[:, :15], after[:, :15])
    assert not torch.allclose(before[:, 15:], after[:, 15:])


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_for_inference_computes_the_same(
    reference: Decoder, policy: ExpertPolicy, dtype: torch.dtype
) -> None:
    plain = copy.deepcopy(reference).to(dtype)
    for ffn, exact in zip(plain.ffns(), reference.ffns(), strict=True):
        ffn.router.data = exact.router.clone()
    packed = copy.deepcopy(plain)
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        packed.prepare()
        expected, found = plain.logits(ids, policy), packed.logits(ids, policy)
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    else:  # a bfloat16 rounding may move a token's last expert, so compare as a whole
        assert (found - expected).norm() / expected.norm() < 0.1


def test_as_many_key_value_heads_as_query_heads_is_plain_attention() -> None:
    model = tiny_model(tiny_config(num_key_value_heads=4))
    logits = model.logits(torch.arange(12)[None], ExpertPolicy.dense())
    assert logits.shape == (1, 12, 300)
    assert bool(logits.isfinite().all())


def test_rotation_keeps_norms_and_depends_on_distance_alone() -> None:
    cos, sin = rope_table(32, 8, 10_000.0)
    query, key = torch.randn(1, 1, 8), torch.randn(1, 1, 8)

    def score(first: int, second: int) -> float:
        rotated_q = rotate(query, cos[[first]], sin[[first]])
        rotated_k = rotate(key, cos[[second]], sin[[second]])
        torch.testing.assert_close(rotated_q.norm(), query.norm())
        return float((rotated_q * rotated_k).sum())

    assert score(5, 3) == pytest.approx(score(25, 23), abs=1e-4)
    assert score(5, 3) != pytest.approx(score(5, 4), abs=1e-3)


def test_generate_stops_after_the_end_of_text(reference: Decoder) -> None:
    prompt = [5, 6, 7]
    output = generate(reference, prompt, 12, ExpertPolicy.top_k(2))
    assert len(output) == 12
    model = copy.deepcopy(reference)
    object.__setattr__(model.config, "eos_token_id", output[3])
    first = output.index(output[3])
    try:
        assert generate(model, prompt, 12, ExpertPolicy.top_k(2)) == output[: first + 1]
    finally:
        object.__setattr__(model.config, "eos_token_id", 0)


def test_fresh_weights_are_a_function_of_the_seed() -> None:
    def make(seed: int) -> Decoder:
        model = Decoder(tiny_config())
        model.initialize(torch.Generator().manual_seed(seed))
        return model

    first, again, other = make(1), make(1), make(2)
    assert torch.equal(first.embedding.weight, again.embedding.weight)
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
