"""The GPU kernels of the engine, each beside a reference in plain PyTorch of the same signature.

- `routing`: scores, the choice of experts, and token-expert pairs sorted by expert.
- `sharing`: the choice that looks at the batch: tokens use what is read anyway.
- `top_k`: the same routing where every token takes as many experts, for training.
- `expert_ffn`: the sparse FFN for few tokens, bound by memory: it reads the chosen rows once.
- `grouped_ffn`: the sparse FFN for many tokens, bound by arithmetic: one grouped product.
- `masked_ffn`: the sparse FFN by dense products, for when nearly every expert is in use.
- `gpu_ways`: which of these three a batch takes, from shapes alone.
- `paged_kv`: keys and values in a paged cache: writing and decoding.
- `add_norm`: a residual sum and the norm that follows it.
- `grouped_training`: the same function with gradients, from the products of `grouped_pairs`.

A launcher takes CUDA tensors, or CPU tensors under Triton's interpreter; its reference takes any.
Nothing here imports the rest of the engine.
"""
