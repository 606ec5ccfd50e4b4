"""`GET /v1/models`: what is served here, in OpenAI's format."""

from __future__ import annotations

from typing import Any, Final, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from server.generation.frontend import Frontend
from server.routes.dependencies import Front
from server.schemas.openai import OpenAIErrorResponse

router = APIRouter(tags=["openai"], prefix="/v1/models")

NOT_FOUND: Final[dict[int | str, dict[str, Any]]] = {
    404: {"model": OpenAIErrorResponse, "description": "The model is not served here."}
}


class Model(BaseModel):
    """A model that is served."""

    id: str = Field(description="Its name.")
    object: Literal["model"] = Field(description="What this is.")
    created: int = Field(description="When its weights began to serve, Unix time.")
    owned_by: str = Field(description="Always `ambidex`.")
    max_model_len: int = Field(description="Tokens of prompt and output together.")


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"] = Field(description="What this is.")
    data: list[Model] = Field(description="One.")


@router.get("", summary="The models: one")
async def list_models(front: Front) -> ModelList:
    """The model that is served. Its name is the setting `model_name`, or its directory's name."""
    return ModelList(object="list", data=[_model(front)])


@router.get("/{name:path}", responses=NOT_FOUND, summary="A model")
async def retrieve_model(name: str, front: Front) -> Model:
    """The model that is served, by its name or one of those that always mean it."""
    front.check_model(name)
    return _model(front)


def _model(front: Frontend) -> Model:
    return Model(
        id=front.model_name,
        object="model",
        created=int(front.fleet.loaded_at),
        owned_by="ambidex",
        max_model_len=front.max_total_tokens,
    )
