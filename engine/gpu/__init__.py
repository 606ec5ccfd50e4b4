"""The GPU kernels of the engine, each beside a reference in plain PyTorch of the same signature.

Which experts:
- `routing`: scores, the choice of experts, and token-expert pairs sorted by expert.
- `route_step`: scores and choice of few tokens in one launch, the norm before them included.
- `sharing`: the choice that looks at the batch: tokens use what is read anyway.
- `top_k`: the same routing where every token takes as many experts, for training.
- `count_chosen`: how many experts a step used.

The FFN:
- `expert_ffn`: for one or a few tokens, bound by memory: reads the rows of each token's experts.
- `union_ffn`: for a batch that decodes: reads each expert that anybody chose once.
- `grouped_ffn`, `grouped_tma`: for many tokens, bound by arithmetic: grouped products over pairs.
- `masked_ffn`: by dense products, for when nearly every expert is in use.
- `gpu_ways`: which of these a batch takes, from shapes alone.
- `grouped_training`: the same function with gradients, from the products of `grouped_pairs`.
- `sliced_ffn`: the same on any device, by slices of the weights.

Around it:
- `thin_linear`: a product of one token, norm before and sum behind included.
- `add_norm`: a residual sum and the norm that follows it.
- `attend_step`: a decoding step of attention: rotation, writes to the cache, and the attending.
- `paged_prefill`: attention of chunks of prompts over the paged cache.
- `paged_kv`: writing to that cache, and decoding over it beside chunks.
- `arrivals`: counters by which programs find out which is the last.

A launcher takes CUDA tensors, or CPU tensors under Triton's interpreter; its reference takes any.
Nothing here imports the rest of the engine.
"""
