"""The frames of server-sent events."""

from __future__ import annotations

import json
import math

from server.http.streaming import sse_event


def test_an_event_is_one_line_of_json_whatever_is_in_it() -> None:
    payload = {"text": "a\nb\r\n\u2028 \u00e9\U0001f600", "logprob": -0.1}
    frame = sse_event(payload)
    assert frame.startswith(b"data: ")
    assert frame.endswith(b"\n\n")
    assert len(frame.decode().removesuffix("\n\n").split("\n")) == 1
    assert json.loads(frame.removeprefix(b"data: ")) == payload


def test_numbers_that_json_lacks_are_null() -> None:
    for number in (math.inf, -math.inf, math.nan):
        assert sse_event({"logprob": number}) == b'data: {"logprob":null}\n\n'
