"""Training: produces checkpoints that the engine runs dense or sparse. Imports engine, never server."""
