"""What a host decides about serving, from `AMBIDEX_*` environment variables or keyword arguments.

Every setting has a range and a description; a value outside the range is refused at start-up, never
later. The engine's options (`EngineConfig`) are settings as they stand there: their names, types,
defaults, ranges and descriptions are read from its fields. `Settings.engine_config` is that part.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self, get_type_hints

from pydantic import Field, ValidationError, create_model, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from engine.checkpoint import STARTER
from engine.config import EngineConfig, Option
from server import playground
from server.http.security import (
    DOCS_PATHS,
    HEALTH_PATHS,
    METRICS_PATHS,
    Key,
    Keyring,
    parse_keys,
    read_keys,
)

# Variables that the engine reads itself.
ENGINE_VARIABLES: Final = frozenset({"AMBIDEX_CACHE", "AMBIDEX_NATIVE"})

# Settings that were removed, and why.
REMOVED: Final = {"priority_age_seconds": "requests have no priorities, they are served in turn"}

# Which settings belong together: in `ambidex serve --help` and in docs/serving.md.
GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "Server": ("host", "port", "stream_interval", "log_level", "access_log", "traces"),
    "Model": (
        *("model", "model_name", "device", "dtype", "kv_cache_bytes", "block_size"),
        *("num_threads", "cuda_graphs", "prefix_caching"),
    ),
    "Scheduling": (
        *("max_num_seqs", "max_num_batched_tokens", "max_waiting", "max_waiting_tokens"),
    ),
    "Limits of a request": (
        *("max_concurrent_requests", "max_input_tokens", "max_total_tokens", "max_body_bytes"),
        *("body_timeout", "max_url_bytes", "max_header_bytes", "request_timeout"),
        "max_request_timeout",
    ),
    "Access": (
        *("api_keys", "api_keys_file", "admin_key", "public_metrics", "public_docs"),
        "playground",
        *("requests_per_minute", "tokens_per_minute", "cors_origins"),
    ),
    "Failure and shutdown": (
        *("step_timeout", "max_restarts", "restart_window"),
        *("exit_on_failure", "exit_delay", "drain_timeout"),
    ),
    "New checkpoints": ("watch", "watch_interval", "reload_memory", "retire_timeout"),
    "Measuring": ("sample_every", "expert_load"),
}

SERVER_DEFAULTS: Final = {"sample_every": 256}  # of the engine's options, where a server's differ
SERVER_NAMES: Final = {"max_model_len": "max_total_tokens"}
# The engine's option for each setting that is one.
ENGINE_SETTINGS: Final = {
    SERVER_NAMES.get(f.name, f.name): f.name for f in fields(EngineConfig) if f.name not in REMOVED
}


def _engine_settings() -> dict[str, Any]:
    """The pydantic field of each setting that is an option of the engine."""
    kinds, found = get_type_hints(EngineConfig), {f.name: f for f in fields(EngineConfig)}
    made: dict[str, Any] = {}
    for setting, name in ENGINE_SETTINGS.items():
        option: Option = found[name].metadata["option"]
        kind = Literal[option.choices] if option.choices else kinds[name]
        default = SERVER_DEFAULTS.get(name, found[name].default)
        made[setting] = (
            kind,
            Field(default=default, ge=option.low, le=option.high, description=option.help),
        )
    return made


if TYPE_CHECKING:  # mypy cannot see these fields: whoever wants types reads `engine_config`

    class _EngineSettings(BaseSettings):
        def __getattr__(self, name: str) -> Any: ...
else:
    _EngineSettings = create_model("_EngineSettings", __base__=BaseSettings, **_engine_settings())


class Settings(_EngineSettings):
    """Settings of one server process; `AMBIDEX_PORT=9000` sets `port`.

    Raises:
        pydantic.ValidationError: for a value out of range, or settings that contradict each other.
    """

    model_config = SettingsConfigDict(
        env_prefix="AMBIDEX_", extra="forbid", frozen=True, hide_input_in_errors=True
    )

    # Without keys anybody may call, so it listens on this machine alone until told otherwise; the
    # container image sets AMBIDEX_HOST=0.0.0.0, where the published port is that decision.
    host: str = Field(
        default="127.0.0.1", min_length=1, max_length=255, description="address to listen on"
    )
    port: int = Field(
        default=8000, ge=0, le=65_535, description="port to listen on; 0 takes a free one"
    )
    model: Path = Field(
        default=STARTER, description="checkpoint directory; default: the packaged starter"
    )
    model_name: str = Field(
        default="",
        max_length=256,
        description="what OpenAI's clients call the model; default: its directory's name",
    )

    max_concurrent_requests: int = Field(
        default=256, ge=1, le=1 << 16, description="requests in the server at once; beyond that 429"
    )
    max_input_tokens: int = Field(
        default=0,
        ge=0,
        le=1 << 20,
        description="tokens of a prompt; 0 takes one less than the total",
    )
    max_body_bytes: int = Field(
        default=2 << 20, ge=1 << 10, le=1 << 30, description="size of a request's body, bytes"
    )
    body_timeout: float = Field(
        default=30.0,
        gt=0.0,
        le=3600.0,
        description="seconds that a request's body may take to arrive",
    )
    stream_interval: float = Field(
        default=0.02,
        ge=0.0,
        le=1.0,
        description="seconds of a stream's events that may be sent together; the first never waits",
    )
    drain_timeout: float = Field(
        default=30.0,
        ge=0.0,
        le=3600.0,
        description="seconds that running requests get after SIGTERM",
    )
    max_url_bytes: int = Field(
        default=8 << 10, ge=64, le=1 << 16, description="length of an URL, bytes"
    )
    max_header_bytes: int = Field(
        default=16 << 10, ge=1 << 10, le=1 << 20, description="size of a request's headers, bytes"
    )
    request_timeout: float = Field(
        default=600.0,
        gt=0.0,
        le=86_400.0,
        description="seconds from a request's arrival to its last token, unless it asks otherwise",
    )
    max_request_timeout: float = Field(
        default=3600.0,
        gt=0.0,
        le=86_400.0,
        description="most seconds that a request may ask for in X-Request-Timeout",
    )

    step_timeout: float = Field(
        default=120.0,
        gt=0.0,
        le=3600.0,
        description="seconds after which a step counts as hung; the first ones compile kernels",
    )
    max_restarts: int = Field(
        default=3, ge=0, le=1000, description="engines that may take a failed one's place"
    )
    restart_window: float = Field(
        default=600.0, gt=0.0, le=86_400.0, description="seconds in which max_restarts holds"
    )
    exit_on_failure: bool = Field(
        default=True,
        description="end the process, status 1, when the engine has failed for good",
    )
    exit_delay: float = Field(
        default=20.0,
        ge=0.0,
        le=3600.0,
        description="seconds that it stays to say so first; more than lie between two scrapes",
    )

    watch: Path | None = Field(
        default=None,
        description="serve the newest checkpoint of this directory, or this one when it changes",
    )
    watch_interval: float = Field(
        default=5.0, ge=0.05, le=86_400.0, description="seconds between two looks at watch"
    )
    reload_memory: Literal["auto", "beside", "drain"] = Field(
        default="auto",
        description="load a new checkpoint beside the old one, or after draining and dropping it; "
        "auto: beside where memory suffices",
    )
    retire_timeout: float = Field(
        default=600.0,
        ge=0.0,
        le=86_400.0,
        description="seconds that requests on replaced weights get to finish",
    )

    api_keys: Annotated[tuple[Key, ...], NoDecode] = Field(
        default=(),
        description="keys that clients need, by commas: [name:]key or [name:]sha256:HEX",
    )
    api_keys_file: Path | None = Field(
        default=None, description="file with such keys, one a line, beside those above"
    )
    admin_key: Annotated[Key | None, NoDecode] = Field(
        default=None, description="key of the admin routes, which are closed without it"
    )
    public_metrics: bool = Field(default=True, description="/metrics needs no key")
    public_docs: bool = Field(default=True, description="/docs and /openapi.json need no key")
    playground: bool = Field(
        default=True, description="serve a page to try the model at /playground"
    )
    requests_per_minute: int = Field(
        default=0, ge=0, le=10**9, description="requests of a key in a minute; 0: no limit"
    )
    tokens_per_minute: int = Field(
        default=0, ge=0, le=10**12, description="generated tokens of a key in a minute; 0: no limit"
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        max_length=100,
        description="origins whose pages may call, by commas; * is any",
    )

    expert_load: bool = Field(
        default=False, description="export how often sampled tokens chose each expert"
    )
    access_log: bool = Field(default=False, description="log one JSON line per request")
    traces: bool = Field(
        default=False, description="export OpenTelemetry traces (extra otel) over OTLP/HTTP"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severe level that is logged"
    )

    @model_validator(mode="before")
    @classmethod
    def _none_was_removed(cls, values: Any) -> Any:
        for name, why in REMOVED.items():
            if name in values:
                raise ValueError(f"{name} was removed: {why}")
        return values

    @field_validator("port", mode="before")
    @classmethod
    def _not_a_service_link(cls, value: Any) -> Any:
        """Explain a port that is an URL: Kubernetes sets it so for a Service named `ambidex`."""
        if isinstance(value, str) and "://" in value:
            raise ValueError(
                "AMBIDEX_PORT is an URL, which Kubernetes sets for a Service named ambidex: "
                "set enableServiceLinks to false in the pod, or give the port"
            )
        return value

    @field_validator("api_keys", mode="before")
    @classmethod
    def _parse_keys(cls, value: Any) -> Any:
        return parse_keys(value.split(",")) if isinstance(value, str) else value

    @field_validator("admin_key", mode="before")
    @classmethod
    def _parse_admin_key(cls, value: Any) -> Any:
        """Read the admin key. Its name is always admin, whatever name the text gives it."""
        if not isinstance(value, str):
            return value
        return Key("admin", Key.parse(value.strip()).digest) if value.strip() else None

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(_listed(value)) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        total = self.engine_config().max_model_len  # the engine's own rules hold at start-up too
        if total and self.max_input_tokens >= total:
            raise ValueError(
                f"max_input_tokens {self.max_input_tokens} must be below max_total_tokens "
                f"{total}: a request generates at least one token"
            )
        self.keyring()
        return self

    def engine_config(self) -> EngineConfig:
        """The engine's part of these settings."""
        values = {name: getattr(self, setting) for setting, name in ENGINE_SETTINGS.items()}
        return EngineConfig(**values)

    def keyring(self) -> Keyring:
        """The keys, and the paths that need none."""
        from_file = read_keys(self.api_keys_file) if self.api_keys_file else ()
        public = HEALTH_PATHS
        public |= METRICS_PATHS if self.public_metrics else frozenset()
        public |= DOCS_PATHS if self.public_docs else frozenset()
        public |= playground.PATHS if self.playground else frozenset()
        return Keyring((*self.api_keys, *from_file), self.admin_key, public)

    def input_limit(self, max_model_len: int) -> int:
        """The most tokens of a prompt whose output must fit into `max_model_len` with it."""
        return min(self.max_input_tokens or max_model_len, max_model_len - 1)


def _listed(text: str) -> Iterable[str]:
    return filter(None, map(str.strip, text.split(",")))


def explain(error: ValidationError) -> str:
    """A line for each setting that was refused, with the name of its environment variable."""
    lines = []
    for problem in error.errors(include_url=False, include_context=False):
        name = "_".join(str(part) for part in problem["loc"])
        lines.append(f"AMBIDEX_{name.upper()}: {problem['msg']}" if name else problem["msg"])
    return "\n".join(lines)


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """A sentence for each variable of `environment` that looks like a setting but is none."""
    known = {f"AMBIDEX_{name.upper()}" for name in Settings.model_fields} | ENGINE_VARIABLES
    sentences = []
    removed = {f"AMBIDEX_{name.upper()}": why for name, why in REMOVED.items()}
    for name in sorted(environment):
        if name.upper() in removed:
            why = removed[name.upper()]
            sentences.append(f"{name[:100]} was removed and is not looked at: {why}")
        elif name.upper().startswith("AMBIDEX_") and name.upper() not in known:
            likely = difflib.get_close_matches(name.upper(), known, 1)
            hint = f"; did you mean {likely[0]}?" if likely else ""
            sentences.append(f"{name[:100]} is no setting and is not looked at{hint}")
    return sentences
