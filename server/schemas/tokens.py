"""Requests and responses of `/tokenize`, `/detokenize` and `/tokenizer_info`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from server.schemas.fields import MAX_TOKENS, Strict, Text
from server.schemas.openai_fields import MAX_NAME, TokenId


class TokenizeRequest(Strict):
    """The body of `POST /tokenize`."""

    prompt: Text = Field(description="The text.")
    model: Annotated[Text, Field(max_length=MAX_NAME)] | None = Field(
        default=None, description="Name of the model: see `GET /v1/models`. Default: the one here."
    )
    add_special_tokens: bool = Field(
        default=True,
        description="Begin with what the tokenizer puts in front of prompts, if anything "
        "(`bos_token` of `GET /tokenizer_info`). Nothing is put behind them.",
    )
    parse_special_tokens: bool = Field(
        default=True,
        description="Read the spelling of a special token as that token. False reads it as text, "
        "which is how prompts are read.",
    )


class TokenizeResponse(BaseModel):
    """The answer to `POST /tokenize`."""

    count: int = Field(description="Number of tokens.")
    max_model_len: int = Field(description="Tokens of prompt and output together.")
    tokens: list[int] = Field(description="The token ids.")


class DetokenizeRequest(Strict):
    """The body of `POST /detokenize`."""

    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS)] = Field(
        description="The token ids."
    )
    model: Annotated[Text, Field(max_length=MAX_NAME)] | None = Field(
        default=None, description="Name of the model: see `GET /v1/models`. Default: the one here."
    )


class DetokenizeResponse(BaseModel):
    """The answer to `POST /detokenize`."""

    prompt: str = Field(description="The text, special tokens spelled out.")


class TokenizerInfo(BaseModel):
    """What a client that tokenises elsewhere needs to know."""

    tokenizer_class: str = Field(description="Always `PreTrainedTokenizerFast`.")
    bos_token: str | None = Field(
        description="What is put in front of prompts that are text; null: nothing."
    )
    eos_token: str = Field(description="How the end of text is spelled.")
    vocab_size: int = Field(description="Tokens in the vocabulary.")
    model_max_length: int = Field(description="Tokens of prompt and output together.")
    chat_template: str = Field(description="The Jinja template of chats.")
