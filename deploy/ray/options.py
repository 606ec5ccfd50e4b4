"""Options of the Serve application, beside the settings of the server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deploy.ray.affinity import LOAD_BOUND, PREFIX_CHARACTERS
from deploy.ray.scaling import TARGET_DEMAND
from server.settings import Settings, unknown_variables


def warnings(settings: Settings, environment: Mapping[str, str]) -> list[str]:
    """Warnings about settings that are allowed but seldom meant; the server logs them too."""
    sentences = unknown_variables(environment)
    if not settings.keyring().keys:
        sentences.append(
            "serving without API keys: everybody who reaches Ray's HTTP port may use it "
            "(AMBIDEX_API_KEYS, AMBIDEX_API_KEYS_FILE)"
        )
    return sentences


class Options(BaseModel):
    """The `args` of the application; everything else is a setting of the server.

    Raises:
        pydantic.ValidationError: for an unknown one, or a value out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: int = Field(default=1, ge=1, le=10_000, description="replicas at least")
    max_replicas: int = Field(default=1, ge=1, le=10_000, description="replicas at most")
    target_demand: float = Field(
        default=TARGET_DEMAND, gt=0, le=1, description="share of a replica that should be in use"
    )
    upscale_delay: float = Field(
        default=30.0, ge=0, le=86_400, description="seconds of too few replicas before one starts"
    )
    downscale_delay: float = Field(
        default=600.0, ge=0, le=86_400, description="seconds of too many before one ends"
    )
    cpus: float = Field(default=1.0, ge=0, le=1024, description="CPUs of a replica")
    gpus: float = Field(default=0.0, ge=0, le=64, description="GPUs of a replica")
    ingresses: int = Field(default=1, ge=1, le=1000, description="processes that forward requests")
    prefix_characters: int = Field(
        default=PREFIX_CHARACTERS,
        ge=1,
        le=1 << 20,
        description="of a prompt that decide which replica it prefers",
    )
    load_bound: float = Field(
        default=LOAD_BOUND,
        gt=1,
        le=1000,
        description="times the mean load that the preferred replica may have",
    )

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Self:
        """Read the `args` of a Serve file, or the arguments of `serve run`, which are texts.

        Raises:
            ValueError: what is wrong, in a sentence.
        """
        try:
            return cls(**args)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(map(str, problem["loc"]))
            raise ValueError(f"{where}: {problem['msg']}" if where else problem["msg"]) from None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas {self.max_replicas} must be at least min_replicas "
                f"{self.min_replicas}"
            )
        return self
