"""Benchmarks of the GPU kernels and of whole models on a GPU."""
