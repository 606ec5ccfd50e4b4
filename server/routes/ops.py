"""`/health`, `/info`, `/metrics`, `/version`: for load balancers, dashboards and people."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter
from prometheus_client import generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from engine.serving.request import MAX_STOPS, MAX_TOP_N
from server.errors import error_body
from server.generation import Frontend
from server.routes.dependencies import Front
from server.schemas.tgi import ErrorResponse
from server.version import VERSION

router = APIRouter(tags=["operations"])

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class QualityPointInfo(BaseModel):
    """Measured quality at one number of experts per token."""

    top_k: int = Field(description="Experts per token.")
    share: float = Field(description="top_k / num_experts.")
    perplexity: float = Field(description="Held-out perplexity.")
    relative: float = Field(description="Perplexity over that of the dense mode, minus 1.")


class ExpertInfo(BaseModel):
    """How the feed-forward layers are divided."""

    num_experts: int = Field(description="Experts per layer.")
    expert_size: int = Field(description="Neurons per expert.")
    default_policy: str = Field(description="What the policy `auto` means.")
    quality: list[QualityPointInfo] = Field(description="Quality by experts per token.")


class Info(BaseModel):
    """The model and the limits of this server; keys are TGI's where it has them."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str = Field(description="Name of the checkpoint directory.")
    model_sha: str = Field(description="SHA-256 over the weights.")
    model_loaded_at: float = Field(description="When these weights began to serve, Unix time.")
    model_dtype: str = Field(description="Type of weights and KV cache.")
    model_device_type: str = Field(description="`cpu` or `cuda`.")
    model_pipeline_tag: str = Field(description="Always `text-generation`.")
    model_parameters: int = Field(description="Parameters, without the routers.")
    num_layers: int = Field(description="Layers of the model.")
    vocab_size: int = Field(description="Tokens in the vocabulary.")
    experts: ExpertInfo = Field(description="The experts of each layer.")
    max_concurrent_requests: int = Field(description="Requests in the server at once.")
    max_best_of: int = Field(description="Always 1.")
    max_stop_sequences: int = Field(description="Strings in `stop`.")
    max_top_n_tokens: int = Field(description="Largest `top_n_tokens`.")
    max_input_tokens: int = Field(description="Tokens of a prompt.")
    max_total_tokens: int = Field(description="Tokens of prompt and output together.")
    max_batch_tokens: int = Field(description="Tokens of one step.")
    max_body_bytes: int = Field(description="Bytes of a request's body.")
    router: str = Field(description="Always `ambidex`.")
    version: str = Field(description="Version of the server.")


class Health(BaseModel):
    """The server can serve."""

    status: str = Field(description="Always `ok`.")


class Version(BaseModel):
    """Which server this is."""

    version: str = Field(description="Version of the server.")


NOT_READY: Final[dict[int | str, dict[str, Any]]] = {
    503: {"model": ErrorResponse, "description": "Not serving."}
}


@router.get(
    "/health",
    response_model=Health,
    responses=NOT_READY,
    summary="Whether the engine makes progress and takes requests",
)
async def health(front: Front) -> Response:
    """As `/health/ready`, for those who ask for one thing only."""
    return await ready(front)


@router.get(
    "/health/ready",
    response_model=Health,
    responses=NOT_READY,
    summary="Whether requests are taken: for load balancers",
)
async def ready(front: Front) -> Response:
    """200 while the engine makes progress and takes requests.

    503 while the server drains, while a step hangs, while a failed engine is replaced, and while a
    new checkpoint is loaded in the place of the old one.
    """
    if front.ready:
        return JSONResponse({"status": "ok"})
    return _unhealthy(front)


@router.get(
    "/health/live",
    response_model=Health,
    responses=NOT_READY,
    summary="Whether a restart is needed: for supervisors",
)
async def live(front: Front) -> Response:
    """503 only once the engine has failed for good, so that a new process must take over."""
    if front.fleet.failure is None:
        return JSONResponse({"status": "ok"})
    return _unhealthy(front)


def _unhealthy(front: Frontend) -> Response:
    reason = "the server is shutting down" if front.draining else front.worker.why_not_ready()
    if front.fleet.failure is not None:
        reason = f"the server has failed for good: {front.fleet.failure}"
    return JSONResponse(error_body(reason, "healthcheck"), 503)


@router.get("/info", summary="The model, its experts, and the server's limits")
async def info(front: Front) -> Info:
    """What is served here, and within which bounds."""
    engine, settings, model = front.engine, front.settings, front.engine.model_config
    return Info(
        model_id=engine.checkpoint.path.resolve().name,
        model_sha=engine.checkpoint.fingerprint,
        model_loaded_at=front.fleet.loaded_at,
        model_dtype=front.dtype,
        model_device_type=settings.device,
        model_pipeline_tag="text-generation",
        model_parameters=model.num_parameters,
        num_layers=model.num_hidden_layers,
        vocab_size=model.vocab_size,
        experts=_experts(front),
        max_concurrent_requests=settings.max_concurrent_requests,
        max_best_of=1,
        max_stop_sequences=MAX_STOPS,
        max_top_n_tokens=MAX_TOP_N,
        max_input_tokens=front.max_input_tokens,
        max_total_tokens=front.max_total_tokens,
        max_batch_tokens=engine.config.max_num_batched_tokens,
        max_body_bytes=settings.max_body_bytes,
        router="ambidex",
        version=VERSION,
    )


def _experts(front: Frontend) -> ExpertInfo:
    experts = front.engine.model_config.experts
    return ExpertInfo(
        num_experts=experts.num_experts,
        expert_size=experts.expert_size,
        default_policy=experts.default_policy,
        quality=[
            QualityPointInfo(
                top_k=p.top_k, share=p.share, perplexity=p.perplexity, relative=p.relative
            )
            for p in experts.quality
        ],
    )


@router.get("/version", summary="The server's version")
async def version() -> Version:
    """Which server this is."""
    return Version(version=VERSION)


_METRICS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Prometheus text format 0.0.4.",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    }
}


@router.get(
    "/metrics",
    response_class=Response,
    responses=_METRICS,
    summary="Counters, gauges and histograms for Prometheus",
)
async def metrics(front: Front) -> Response:
    """Everything the engine counts; names begin with `ambidex_`."""
    return Response(generate_latest(front.registry), media_type=METRICS_TYPE)
