"""`/tokenize`, `/detokenize`, `/tokenizer_info`: the tokenizer for clients that count tokens.

The format is vLLM's, which evaluation harnesses use in place of a tokenizer of their own.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from fastapi import APIRouter

from engine.errors import InvalidRequest, require
from server.generation.chat_prompt import PLAIN
from server.routes.dependencies import Front
from server.schemas.tgi import ErrorResponse
from server.schemas.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)

router = APIRouter(tags=["tokens"])

ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    404: {"model": ErrorResponse, "description": "The model is not served here."},
    408: {"model": ErrorResponse, "description": "The body did not arrive in time."},
    413: {"model": ErrorResponse, "description": "The body is too large."},
    422: {"model": ErrorResponse, "description": "It cannot be tokenised as asked."},
    429: {"model": ErrorResponse, "description": "Too many requests: see Retry-After."},
    503: {"model": ErrorResponse, "description": "The server is shutting down."},
    504: {"model": ErrorResponse, "description": "It took longer than it may."},
}


@router.post("/tokenize", responses=ERRORS, summary="Text to token ids")
async def tokenize(body: TokenizeRequest, front: Front) -> TokenizeResponse:
    """The tokens of a text, with those in front that the tokenizer puts in front of prompts."""
    front.check_model(body.model)
    tokenizer = front.engine.tokenizer
    encode = tokenizer.encode_parsing if body.parse_special_tokens else tokenizer.encode
    ids = await front.in_thread(partial(encode, body.prompt))
    ids = tokenizer.started(ids) if body.add_special_tokens else ids
    return TokenizeResponse(count=len(ids), max_model_len=front.max_total_tokens, tokens=ids)


@router.post("/detokenize", responses=ERRORS, summary="Token ids to text")
async def detokenize(body: DetokenizeRequest, front: Front) -> DetokenizeResponse:
    """The text of token ids, special tokens spelled out."""
    front.check_model(body.model)
    top = front.engine.model_config.vocab_size - 1
    message = f"tokens must be ids from 0 to {top}"
    require(max(body.tokens, default=0) <= top, message, InvalidRequest)
    text = await front.in_thread(partial(front.engine.tokenizer.spell, body.tokens))
    return DetokenizeResponse(prompt=text)


@router.get("/tokenizer_info", summary="The tokenizer's special tokens and chat template")
async def tokenizer_info(front: Front) -> TokenizerInfo:
    """What a client needs to work with this tokenizer from afar."""
    template = front.engine.checkpoint.chat_template
    tokenizer = front.engine.tokenizer
    return TokenizerInfo(
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=tokenizer.spell(tokenizer.start_ids) or None,
        eos_token=tokenizer.eos_token,
        vocab_size=tokenizer.vocab_size,
        model_max_length=front.max_total_tokens,
        chat_template=PLAIN if template is None else template,
    )
