"""`GET /playground`: a page to try the model in a browser, shipped with the package.

Its files are read once. They need no key, because they hold no data: the page asks the API for all
that it shows, with a key where the server has keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from server.playground import FILES, MEDIA_TYPES, PAGE

# The page may load its own scripts and styles only, call this server only, and be in no frame.
POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        *("script-src 'self'", "style-src 'self'", "connect-src 'self'", "img-src data:"),
        *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
    )
)
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # browsers ask each time, but the ETag saves the transfer
}


def routes() -> Iterator[Route]:
    """A route for each file; it answers HEAD as well."""
    for file in FILES:
        path = PAGE if file.suffix == ".html" else f"{PAGE}/{file.name}"
        yield Route(path, _Asset(file.read_bytes(), MEDIA_TYPES[file.suffix]).answer)


class _Asset:
    """A file of the page."""

    def __init__(self, content: bytes, media_type: str) -> None:
        self.content = content
        self.media_type = media_type
        self.etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'

    async def answer(self, request: Request) -> Response:
        headers = HEADERS | {"ETag": self.etag}
        if self._is_known(request.headers):
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)

    def _is_known(self, headers: Headers) -> bool:
        """Whether the client has this very file (RFC 9110, section 13.1.2)."""
        known = headers.get("if-none-match", "").split(",")
        return any(tag.strip().removeprefix("W/") in (self.etag, "*") for tag in known)
