"""Benchmarks of what serves over HTTP."""
