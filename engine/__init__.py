"""The engine: models whose feed-forward layers run dense or as a mixture of experts, and their serving.

Layers, from the ground up: errors, config, request; kernels and experts; model and checkpoint; KV
blocks and scheduler (no tensors); sampler and runner; engine and worker. Knows no HTTP and no
training.
"""
