"""Real servers, as in tests/server, for what watches them from outside."""

from __future__ import annotations

from tests.server.conftest import checkpoint_dir, serve

__all__ = ["checkpoint_dir", "serve"]
