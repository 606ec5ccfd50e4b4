"""The GPU kernels of the engine, each beside a reference in plain PyTorch of the same signature.

`routing/`: which experts.
- `rule`: the rule of choice, in plain torch and as what kernels call.
- `choose_few`: the choice of few tokens in one launch, the norm before it included.
- `choose_many`: the choice of many tokens in two launches.
- `choose_top_k`: the choice where every token takes as many experts, for training.
- `pairs`: token-expert pairs sorted by expert.
- `count_chosen`: how many experts a step used.

`ffn/`: the sparse FFN, in one of four ways.
- `few_tokens`: bound by memory; reads the rows of each token's experts.
- `used_experts`: for a batch that decodes; reads each expert that any token uses, once.
- `many_tokens`: bound by arithmetic; multiplies each token with its own experts.
- `all_experts`: dense products, for when nearly every expert is in use.
- `cheapest_way`: which of these a batch takes, from shapes alone.
- `training`: what `many_tokens` computes, with gradients.
- `products`, `product_blocks`: the products over sorted pairs that both are made of.
- `activations`: what stands between the two products of all of them.

`attention/`: over the paged cache.
- `attend_step`: a decoding step: rotation, writes to the cache, and the attending.
- `rotate_and_store`: rotation and writes of any batch, before `attend_chunks`.
- `attend_chunks`: chunks of prompts.
- `batches`: which of these a batch takes.

Around them:
- `thin_linear`: a product of one token, norm before and sum behind included.
- `add_norm`: a residual sum and the norm that follows it.
- `arrivals`: counters by which programs find out which is the last.

A launcher takes CUDA tensors, or CPU tensors under Triton's interpreter; its reference takes any.
"""
