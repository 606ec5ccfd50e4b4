"""API keys: who may do what. `Authorization: Bearer KEY` on every route but the public ones.

Keys are kept as SHA-256 and compared in constant time with every known one, so neither the memory
of the process nor the time of an answer reveals a key. A key is written as one of

    key
    name:key
    sha256:HEX            the hash instead of the key itself
    name:sha256:HEX

A key has a name, for logs and metrics; without one it is called after its hash.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from engine.errors import AmbidexError, ConfigError, require

MIN_KEY_CHARS: Final = 16
MAX_KEY_CHARS: Final = 512
MAX_KEYS: Final = 1000
MAX_FILE_BYTES: Final = 1 << 20
HEALTH_PATHS: Final = frozenset({"/health", "/health/live", "/health/ready"})
METRICS_PATHS: Final = frozenset({"/metrics"})
DOCS_PATHS: Final = frozenset({"/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY: Final = re.compile(rf"[!-9;-~]{{{MIN_KEY_CHARS},{MAX_KEY_CHARS}}}")  # printable, no colon
_DIGEST: Final = re.compile(r"[0-9a-fA-F]{64}")


class Unauthorized(AmbidexError):
    """No key was given, or one that nobody knows."""


class Forbidden(AmbidexError):
    """The key is known, but does not open this route."""


@dataclass(frozen=True)
class Key:
    """A key: its name, and the SHA-256 of what clients send."""

    name: str
    digest: bytes = field(repr=False)

    @classmethod
    def parse(cls, line: str) -> Key:
        """Read one line; errors name the rule, never the line."""
        *names, secret = line.split(":")
        hashed = bool(names) and names[-1] == "sha256"
        if hashed:
            names.pop()
        require(len(names) <= 1, "a line must be [name:]key or [name:]sha256:HEX")
        name = names[0] if names else None
        require(
            name is None or (_NAME.fullmatch(name) is not None and name != "sha256"),
            "a key's name must have 1 to 64 of the characters A-Z a-z 0-9 . _ -",
        )
        if hashed:
            require(_DIGEST.fullmatch(secret) is not None, "sha256: takes 64 hexadecimal digits")
            digest = bytes.fromhex(secret)
        else:
            require(
                _KEY.fullmatch(secret) is not None,
                f"a key must have {MIN_KEY_CHARS} to {MAX_KEY_CHARS} printable characters, "
                "no space, no colon",
            )
            digest = digest_of(secret)
        return cls(name or f"key-{digest.hex()[:8]}", digest)


def digest_of(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def parse_keys(lines: Iterable[str]) -> tuple[Key, ...]:
    """The keys of these lines; empty ones and those that begin with # are skipped.

    Raises:
        ConfigError: a line cannot be read, or two have the same name.
    """
    texts = [text for line in lines if (text := line.strip()) and not text.startswith("#")]
    require(len(texts) <= MAX_KEYS, f"at most {MAX_KEYS} keys are taken, got {len(texts)}")
    keys = tuple(map(Key.parse, texts))
    require(len({key.name for key in keys}) == len(keys), "every key needs a name of its own")
    return keys


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file, one a line.

    Raises:
        ConfigError: naming the file.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        require(len(data) <= MAX_FILE_BYTES, f"is larger than {MAX_FILE_BYTES >> 20} MiB")
        keys = parse_keys(data.decode().splitlines())
        require(bool(keys), "holds no key")
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return keys


class Keyring:
    """The keys of a server, and which routes they open.

    API keys open everything but /admin; the admin key opens everything. Without API keys
    everything but /admin is open; without an admin key /admin is closed.

    Args:
        keys: API keys.
        admin: the admin key.
        public: paths that need no key.
    """

    def __init__(self, keys: Sequence[Key], admin: Key | None, public: frozenset[str]) -> None:
        self.keys = tuple(keys)
        self.admin = admin
        self.public = public
        names = [key.name for key in self._all()]
        require(len(set(names)) == len(names), "every key needs a name of its own")

    def _all(self) -> tuple[Key, ...]:
        return self.keys if self.admin is None else (*self.keys, self.admin)

    def authorize(self, path: str, authorization: str) -> Key | None:
        """The key of a request; None where none is needed and none was given.

        Args:
            path: of the URL, decoded.
            authorization: the header, "" if there is none.

        Raises:
            Unauthorized: the route needs a key, and none was given that is known.
            Forbidden: the key does not open the route.
        """
        if path in self.public:
            return None
        key = self._find(authorization)
        if path == "/admin" or path.startswith("/admin/"):
            if self.admin is None:
                raise Forbidden("the admin routes are closed: no AMBIDEX_ADMIN_KEY is set")
            if key is None:
                raise Unauthorized("this route needs the admin key, as Authorization: Bearer KEY")
            if key is not self.admin:
                raise Forbidden("this route needs the admin key")
        elif key is None and self.keys:
            raise Unauthorized("an API key is needed, as Authorization: Bearer KEY")
        return key

    def _find(self, authorization: str) -> Key | None:
        """The known key in a header, or None. It takes as long in every case."""
        scheme, _, secret = authorization.strip().partition(" ")
        digest = digest_of(secret.strip()[: MAX_KEY_CHARS + 1])
        found = None
        for key in self._all():
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found if scheme.lower() == "bearer" else None
