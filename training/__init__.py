"""Training: produces checkpoints that the engine runs dense or sparse. Never imports server."""
