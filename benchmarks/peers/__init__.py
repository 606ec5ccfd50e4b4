"""Benchmarks against other systems, which run in processes of their own."""
