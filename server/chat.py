"""From a chat's messages to a prompt: the checkpoint's template, or a plain one.

The template is the checkpoint's, never a client's. It runs in Jinja's immutable sandbox, bounded in
output and time, away from the event loop. What it writes itself may name special tokens, and they
become those tokens; where a message spells one it stays text, so no client can end a turn of
somebody else.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import InvalidRequest
from engine.text.tokenizer import END_OF_TEXT, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_PROMPT_CHARS: Final = 8 << 20  # several times what a body may hold
MAX_SECONDS: Final = 2.0

# A base model has seen dialogues of this kind, if any; what follows the next one's name is not its.
PLAIN: Final = """\
{%- for message in messages -%}
{{ message.name or message.role | capitalize }}: {{ message.content }}
{% endfor -%}
{%- if add_generation_prompt %}Assistant:{% endif -%}"""


class TemplateError(InvalidRequest):
    """The template refuses these messages, or does not work."""


class _TooSlow(Exception):
    """Rendering has taken longer than it may."""


def _raise_exception(message: object) -> str:
    """What templates call to refuse messages, such as a role that they do not know."""
    raise jinja2.TemplateError(str(message))


def _tojson(value: Any, indent: int | None = None) -> str:
    """As in Hugging Face's templates: Jinja's own would escape for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _strftime_now(pattern: str) -> str:
    return time.strftime(pattern)


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise _TooSlow once the block has run for `seconds`, also in a loop that writes nothing.

    By tracing this thread line by line: a template is a few dozen lines, so that costs little. One
    line that takes long by itself is not interrupted.
    """
    end = time.monotonic() + seconds

    def trace(_frame: FrameType, _event: str, _arg: Any) -> Any:
        if time.monotonic() > end:
            raise _TooSlow
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def render(
    source: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str = END_OF_TEXT,
    eos_token: str = END_OF_TEXT,
    seconds: float = MAX_SECONDS,
    max_chars: int = MAX_PROMPT_CHARS,
) -> str:
    """The prompt that `messages` make, with the next turn of the assistant begun.

    Args:
        source: the template; None takes a plain one.
        messages: {"role", "content"} and what else a message may have.
        bos_token, eos_token: how these are spelled.
        seconds: that rendering may take.
        max_chars: that the prompt may have.

    Raises:
        TemplateError: it refuses the messages, does not work, or exceeds a bound.
    """
    text, size = [], 0
    try:
        template = _compile(PLAIN if source is None else source)
        with _deadline(seconds):
            for part in template.generate(
                messages=messages,
                add_generation_prompt=True,
                bos_token=bos_token,
                eos_token=eos_token,
            ):
                text.append(part)
                size += len(part)
                if size > max_chars:
                    raise TemplateError(_complaint(f"writes over {max_chars} characters"))
    except _TooSlow as error:
        raise TemplateError(_complaint(f"takes over {seconds:g} seconds")) from error
    except TemplateError:
        raise
    except Exception as error:  # a template can raise whatever Python can
        raise TemplateError(_complaint(f"says {str(error)[:300]!r}")) from error
    return "".join(text)


def plain_stops(messages: Sequence[Mapping[str, Any]], most: int) -> tuple[str, ...]:
    """Where an answer by the plain template ends: where it would begin a user's next turn.

    Args:
        messages: of the chat.
        most: strings to return; of many names the latest count, `User` always does.
    """
    users = [m.get("name", "User") for m in reversed(messages) if m["role"] == "user"]
    latest = list(dict.fromkeys(users))[: most - 1]
    return tuple(f"\n{name}:" for name in dict.fromkeys([*latest, "User"]))


def _complaint(what: str) -> str:
    return f"messages must be such as the model's chat template takes: it {what}"


def prompt_ids(
    tokenizer: Tokenizer, source: str | None, messages: Sequence[Mapping[str, Any]]
) -> list[int]:
    """The prompt of `messages` as token ids; see `render`.

    A checkpoint's template writes itself what a prompt begins with; the plain one knows nothing of
    that.
    """
    mark = secrets.token_hex(8)  # not to be guessed, so no message can contain it
    specials = tokenizer.special_texts
    encoded = [tokenizer.encode(text) for text in specials]
    spelled = re.compile("|".join(map(re.escape, specials)))

    def hide(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return spelled.sub(lambda match: f"{mark}{specials.index(match.group()):06d}", value)

    hidden = [{key: hide(value) for key, value in message.items()} for message in messages]
    prompt = render(source, hidden, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    ids: list[int] = []
    for position, part in enumerate(re.split(rf"{mark}(\d{{6}})", prompt)):
        if position % 2:
            ids += encoded[int(part)]
        elif part:
            ids += tokenizer.encode_parsing(part)
    return tokenizer.started(ids) if source is None else ids
