"""The engine: models whose FFNs run dense or as a mixture of experts, and how they are served.

Layers, from the ground up: errors, config, request; kernels and experts; model and checkpoint; KV
blocks and scheduler (no tensors); sampler and runner; engine and worker. Knows no HTTP and no
training.
"""
