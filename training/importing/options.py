"""What users decide about an import, and what follows where they do not.

Shapes: F neurons, E experts, S neurons per expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from engine.config import MAX_EXPERTS, check_choice, check_range
from engine.errors import require

ROUTERS: Final = ("fitted", "centroid")
DTYPES: Final = ("auto", "float32", "bfloat16")
_USUAL_EXPERTS: Final = 128
_LEAST_SIZE, _MOST_SIZE = 16, 64  # neurons of an expert, where the choice is ours


@dataclass(frozen=True)
class ImportOptions:
    """The settings of an import.

    Attributes:
        num_experts: how many each layer gets; 0: chosen from the number of neurons.
        expert_size: neurons of an expert; 0: follows from `num_experts`.
        cluster: how neurons are grouped: by their `weights`, the only way that is left.
        router: `fitted` to the true activation mass where that covers more than its beginning, the
            `centroid` of the experts' weights; or that alone.
        calibration_tokens: how many tokens routers are fitted and compared on; 0: by the model's
            size.
        quality_tokens: how many held-out tokens the quality curve is measured on; 0: by the
            model's size.
        dtype: the type of the written weights and of the products; `auto` is the source's, but
            bfloat16 for float16, which no CPU computes with.
        max_loss: how much perplexity the recommended policy may lose, as a share of the dense one.
        seed: decides the sample of text and the clusterings.
    """

    num_experts: int = 0
    expert_size: int = 0
    cluster: str = "weights"
    router: str = "fitted"
    calibration_tokens: int = 0
    quality_tokens: int = 0
    dtype: str = "auto"
    max_loss: float = 0.01
    seed: int = 1

    def __post_init__(self) -> None:
        check_range("--experts", self.num_experts, 0, MAX_EXPERTS)
        check_range("--expert-size", self.expert_size, 0, 1 << 20)
        require(
            self.cluster != "coactivation",
            "--cluster coactivation was removed, because it made models no better (docs/log.md); "
            "leave --cluster out to cluster by weights",
        )
        check_choice("--cluster", self.cluster, ("weights",))
        check_choice("--router", self.router, ROUTERS)
        check_range("--calibration-tokens", self.calibration_tokens, 0, 1 << 24)
        check_range("--quality-tokens", self.quality_tokens, 0, 1 << 24)
        check_choice("--dtype", self.dtype, DTYPES)
        check_range("--max-loss", self.max_loss, 0.0, 1.0)
        check_range("--seed", self.seed, 0, (1 << 31) - 1)


def parse_loss(text: str) -> float:
    """A share such as "1%" or "0.01".

    Raises:
        ConfigError: if it is neither, or not between 0% and 100%.
    """
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    require(
        not rest and 0 <= value <= 1,
        f"--max-loss must be a share between 0% and 100%, such as 1% or 0.01; got {text[:40]!r}",
    )
    return value


def choose_experts(neurons: int, num_experts: int = 0, expert_size: int = 0) -> tuple[int, str]:
    """(E, why) for `neurons` neurons; 0 leaves a number to be chosen.

    About 128 experts, of 16 to 64 neurons: finer ones lose less quality, coarser ones compute
    faster, and kernels like multiples of 16.

    Raises:
        ConfigError: if the wish does not divide the neurons, or nothing does.
    """
    if expert_size and not num_experts:
        require(
            neurons % expert_size == 0 and 2 <= neurons // expert_size <= MAX_EXPERTS,
            f"--expert-size {expert_size} must divide the model's {neurons} neurons into 2 to "
            f"{MAX_EXPERTS} experts",
        )
        return neurons // expert_size, "as asked for"
    if num_experts:
        require(
            num_experts >= 2 and neurons % num_experts == 0,
            f"--experts {num_experts} must be at least 2 and divide the model's {neurons} neurons"
            f"{_neighbours(neurons, num_experts)}",
        )
        require(
            expert_size in (0, neurons // num_experts),
            f"--experts {num_experts} makes experts of {neurons // num_experts} neurons, not of "
            f"--expert-size {expert_size}: give one of the two",
        )
        return num_experts, "as asked for"
    target = min(max(neurons / _USUAL_EXPERTS, _LEAST_SIZE), _MOST_SIZE)
    divisors = [e for e in range(2, MAX_EXPERTS + 1) if neurons % e == 0]
    require(
        bool(divisors),
        f"the model's {neurons} neurons have no divisor from 2 to {MAX_EXPERTS}: they cannot be "
        f"cut into equal experts",
    )

    def distance(experts: int) -> tuple[float, int]:
        size = neurons // experts
        ratio = max(size / target, target / size)
        return ratio * (1.0 if size % 16 == 0 else 1.5), experts

    return min(divisors, key=distance), (
        f"the nearest to {_USUAL_EXPERTS} experts of {_LEAST_SIZE} to {_MOST_SIZE} neurons, "
        f"multiples of 16 preferred"
    )


def _neighbours(neurons: int, wish: int) -> str:
    """The nearest numbers of experts that divide the neurons, as the end of a sentence."""
    fitting = [e for e in range(2, MAX_EXPERTS + 1) if neurons % e == 0]
    near = sorted(sorted(fitting, key=lambda e: abs(e - wish))[:3])
    return f"; near it are {', '.join(map(str, near))}" if near else ""
