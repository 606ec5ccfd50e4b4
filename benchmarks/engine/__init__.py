"""Benchmarks of the engine in this process, on this CPU."""
