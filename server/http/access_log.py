"""The access log has one line for each request, a JSON object."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Final

from server.http.calls import Call

LOGGER: Final = "ambidex.access"
logger = logging.getLogger(LOGGER)


def write_to_stderr() -> None:
    """Write the lines to standard error as they are, without the prefix of other messages."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def record(call: Call) -> dict[str, Any]:
    """The line of `call`. Times are in milliseconds; numbers that it does not have are left out."""
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(call.started))
    line: dict[str, Any] = {
        "time": f"{moment}.{int(call.started % 1 * 1000):03d}Z",
        "request_id": call.request_id,
        "method": call.method,
        "path": call.path,
        "route": call.route,
        "status": call.status,
        "duration_ms": _ms(call.seconds),
        "client": call.client,
        "key": call.key.name if call.key else None,
    }
    if call.user is not None:
        line["user"] = call.user
    if call.first_token is not None:
        line["first_token_ms"] = _ms(call.first_token)
    if call.outcome is not None:
        line["outcome"] = call.outcome
        line["generated_tokens"] = call.generated_tokens
    if call.usages:
        line |= _usage(call)
    return line


def _usage(call: Call) -> dict[str, Any]:
    """Sums over the completions of a call; of their times, the longest."""
    available = sum(u.experts_available for u in call.usages)
    activated = sum(u.experts_activated for u in call.usages)
    return {
        "prompt_tokens": sum(u.prompt_tokens for u in call.usages),
        "queue_ms": _ms(max(u.queue_seconds for u in call.usages)),
        "inference_ms": _ms(max(u.inference_seconds for u in call.usages)),
        "activated_ratio": round(activated / available, 6) if available else None,
    }


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def write(call: Call) -> None:
    """Log the line of a request that has ended."""
    logger.info(json.dumps(record(call), separators=(",", ":")))
