"""The GPU training benchmark, its checks in the interpreter and its clock replaced."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import training
from benchmarks.gpu.timing import Call
from benchmarks.gpu.training import check_layer, layer_records, random_layer

TINY = (40, (48, 6 * 16), (6, 2))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_the_check_measures_every_gradient() -> None:
    records = check_layer(random_layer(*TINY, torch.float32, DEVICE), "tiny")
    assert [r.name.split()[2] for r in records] == ["y", "dx", "dup", "ddown"]
    assert all(0 < record.value < 2e-5 for record in records)


def test_a_wrong_gradient_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(*TINY, torch.float32, DEVICE)
    monkeypatch.setattr(training.Layer, "kernels", training.Layer.dense)
    with pytest.raises(SystemExit, match=r"training y tiny: relative error .* exceeds 2e-05"):
        check_layer(layer, "tiny")


def test_the_masked_peer_computes_the_sparse_layer() -> None:
    layer = random_layer(*TINY, torch.float32, DEVICE)
    masked, slices = (layer.step(f)(0) for f in (layer.masked, layer.slices))
    torch.testing.assert_close(masked, slices)
    everyone = random_layer(40, (48, 6 * 16), (6, 6), torch.float32, DEVICE)
    torch.testing.assert_close(*(everyone.step(f)(0) for f in (everyone.masked, everyone.dense)))


def test_every_rival_and_product_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_once(rivals: list[Call], calls: int) -> list[float]:
        for call in rivals:
            call(0)
        return [10.0 * calls + i for i in range(len(rivals))]

    monkeypatch.setattr(training, "interleaved_us", run_once)
    monkeypatch.setattr(training, "eager_us", lambda call: run_once([call], 1)[0])
    records = layer_records(random_layer(*TINY, torch.bfloat16, DEVICE), calls=1)
    names = [record.name.removesuffix(" k=2/6") for record in records]
    assert names == [
        *(f"training {name}" for name in ("dense", "masked", "kernels")),
        *(f"training eager {name}" for name in ("dense", "slices", "kernels")),
        *(
            f"product {name}"
            for name in ("tiles", "gather", "gather back", "spread", "weights", "route")
        ),
    ]
    assert records[2].ratio == 10 / 12
