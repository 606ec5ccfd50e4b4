"""What surrounds the training loop: a run's saved state, its interruption and its end."""
