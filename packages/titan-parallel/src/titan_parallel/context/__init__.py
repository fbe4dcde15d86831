"""Context parallelism: each sequence is cut over ranks, and attention covers the full sequence.

Called by `apply` (which replaces the plan's attention modules), by `model` (which cuts every microbatch with `inputs`)
and by users through `context_attention`. Returns attention outputs for this rank's tokens.

    layout -> inputs            which tokens each rank has; cutting inputs, gathering outputs
    attention -> collectives    all-gather of keys and values, all-to-all of heads
              -> ring           keys and values travel around; collectives.Passing
              -> blockwise      rectangles and causal squares -> kernels
              -> flex           documents on CUDA
"""
