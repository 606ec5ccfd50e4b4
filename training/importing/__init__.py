"""Checkpoints of other makers, read layer by layer and turned into experts."""
