"""Which replica a request prefers: prompts that begin alike go to the same one, within a bound.

A replica keeps the keys and values of prompts that it has seen, so a prompt that begins like an
earlier one is cheaper there. The beginning of the prompt is the key of rendezvous hashing (Thaler
and Ravishankar, 1998): every replica has a score for every key, the highest is preferred. Nothing
is remembered, so every ingress decides alike, and a replica that comes or goes moves only the keys
that it gains or loses. Popular beginnings must not bury one replica while others are idle: a
replica whose load is more than `bound` times the mean is passed over (consistent hashing with
bounded loads; Mirrokni, Thorup and Zadimoghaddam, 2018).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

PREFIX_CHARACTERS: Final = 256  # about 5 KV blocks; prompts that share less gain little
LOAD_BOUND: Final = 1.5
_CHARACTERS_PER_TOKEN: Final = 4


def prompt_key(body: bytes, characters: int = PREFIX_CHARACTERS) -> bytes | None:
    """What identifies the beginning of the prompt in a request's JSON body.

    For TGI's `inputs` and OpenAI's `prompt` these are the first `characters`, or as many token ids
    as make about that many; of several prompts the first counts. For a chat it is the text up to
    the first message of the user, so that a conversation keeps its key as it grows.

    Returns:
        The key; None if the body has no prompt. The replica then says what is wrong.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    if "messages" in document:
        text = _conversation(document["messages"])
    else:
        text = _text(document.get("inputs", document.get("prompt")), characters)
    return text[:characters].encode("utf-8", "backslashreplace") or None


def _text(prompt: Any, characters: int) -> str:
    """The beginning of a text, of token ids, or of the first of a list of either."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, list):
        return ",".join(map(str, prompt[: max(1, characters // _CHARACTERS_PER_TOKEN)]))
    return prompt if isinstance(prompt, str) else ""


def _conversation(messages: Any) -> str:
    """The messages of a chat up to the first one of the user, in one text."""
    parts: list[str] = []
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict):
            break
        role, content = message.get("role"), message.get("content")
        if isinstance(content, list):  # OpenAI's parts
            texts = (part.get("text") for part in content if isinstance(part, dict))
            content = "".join(text for text in texts if isinstance(text, str))
        if isinstance(role, str) and isinstance(content, str):
            parts.append(f"{role}: {content}\n")
        if role == "user":
            break
    return "".join(parts)


def ranked(key: bytes, replicas: Iterable[str]) -> list[str]:
    """The replicas by their score for `key`, the preferred one first."""
    return sorted(replicas, key=lambda replica: _score(key, replica), reverse=True)


def _score(key: bytes, replica: str) -> bytes:
    return hashlib.blake2b(replica.encode(), key=hashlib.sha256(key).digest()).digest()


def preferences(
    key: bytes | None, loads: Mapping[str, int], bound: float = LOAD_BOUND
) -> list[list[str]]:
    """The replicas in groups to be tried in turn. Within a group the least loaded one is best.

    Args:
        key: the key of the prompt's beginning; with None all replicas are alike.
        loads: how many requests each replica has.
        bound: how many times the mean load, this request included, the preferred one may have.
    """
    if key is None or not loads:
        return [list(loads)] if loads else []
    most = math.ceil(bound * (sum(loads.values()) + 1) / len(loads))
    order = ranked(key, loads)
    groups = [[replica] for replica in order if loads[replica] < most]
    full = [replica for replica in order if loads[replica] >= most]
    return [*groups, full] if full else groups
