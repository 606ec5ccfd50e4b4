"""Run in an environment with `text-generation`: its clients against the server at URL.

usage: tgi.py URL; writes what they got as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys

from text_generation import AsyncClient, Client
from text_generation.errors import NotFoundError, ValidationError


async def stream(url: str) -> str:
    events = AsyncClient(url).generate_stream("hello", max_new_tokens=8)
    return "".join([event.token.text async for event in events])


def main(url: str) -> None:
    client = Client(url)
    answer = client.generate("hello", max_new_tokens=8, decoder_input_details=True, top_n_tokens=2)
    events = list(client.generate_stream("hello", max_new_tokens=8))
    chat = client.chat([{"role": "user", "content": "hi"}], max_tokens=8, temperature=0.0)
    errors = []
    for options in (
        {"max_new_tokens": 1 << 20},
        {"top_p": 0.5, "typical_p": 0.5, "top_k": 1 << 30},
    ):
        try:
            client.generate("hello", **options)
        except ValidationError as error:
            errors.append(str(error))
    try:
        Client(url + "/nowhere").generate("hello")
    except NotFoundError as error:
        errors.append(str(error))
    found = {
        "text": answer.generated_text,
        "tokens": answer.details.generated_tokens,
        "prefill": len(answer.details.prefill),
        "streamed": "".join(event.token.text for event in events),
        "last": events[-1].generated_text,
        "asynchronous": asyncio.run(stream(url)),
        "chat": chat.choices[0].message.content,
        "errors": errors,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
