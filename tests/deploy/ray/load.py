"""Clients that count how their requests end: nothing may be left without a terminal answer."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx


@dataclass
class Load:
    """What came of the requests so far.

    Attributes:
        ends: complete, error (said in the wire format), refused (429, 503), or broken: anything
            else, such as a connection that was cut.
        details: of what broke.
    """

    ends: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)

    def note(self, end: str, detail: str = "") -> None:
        self.ends[end] += 1
        if end == "broken":
            self.details.append(detail)


def _once(http: httpx.Client, number: int, tokens: int, load: Load) -> None:
    """One request: a stream of either interface, or a whole answer."""
    prompt, kind = f"{number % 7} of the prompts", number % 3
    try:
        if kind == 0:
            body = {"inputs": prompt, "parameters": {"max_new_tokens": tokens}}
            response = http.post("/generate", json=body)
            whole = "generated_text" in response.text
            load.note(_of_status(response, whole), response.text)
        elif kind == 1:
            body = {"inputs": prompt, "parameters": {"max_new_tokens": tokens}}
            response = http.post("/generate_stream", json=body)
            load.note(_of_status(response, _tgi_ended(response.text)), response.text[-500:])
        else:
            fields = {"prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}
            response = http.post("/v1/completions", json=fields)
            load.note(_of_status(response, _openai_ended(response.text)), response.text[-500:])
    except httpx.HTTPError as error:
        load.note("broken", repr(error))


def _of_status(response: httpx.Response, complete: bool) -> str:
    if response.status_code == 200:
        if complete:
            return "complete"
        last = response.text.removesuffix("data: [DONE]\n\n").rstrip().rsplit("\n\n", 1)[-1]
        said = json.loads(last.removeprefix("data: ")).get("error") if last else None
        return "error" if said else "broken"
    known = response.status_code in (429, 503) and "error" in response.json()
    return "refused" if known else "broken"


def _tgi_ended(text: str) -> bool:
    last = text.rstrip().rsplit("\n\n", 1)[-1].removeprefix("data: ")
    return bool(last) and json.loads(last).get("generated_text") is not None


def _openai_ended(text: str) -> bool:
    return text.endswith("data: [DONE]\n\n") and '"error"' not in text


@contextmanager
def under_load(url: str, clients: int = 8, tokens: int = 40) -> Iterator[Load]:
    """Clients that send one request after another until the block ends, and then finish theirs."""
    load, stop = Load(), threading.Event()

    def client(first: int) -> None:
        number = first
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
            while not stop.is_set():
                _once(http, number, tokens, load)
                number += clients

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        stop.set()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads)


def wait_for_more(load: Load, requests: int, seconds: float = 60) -> None:
    """Return once so many more requests have ended."""
    deadline, wanted = time.monotonic() + seconds, load.ends.total() + requests
    while load.ends.total() < wanted:
        assert time.monotonic() < deadline, f"requests do not end: {load.ends}"
        time.sleep(0.02)
