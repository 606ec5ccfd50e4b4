"""One request from its prompt to its token events."""
