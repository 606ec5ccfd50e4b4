"""Benchmarks of training steps, of trained quality and of importing models."""
