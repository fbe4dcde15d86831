"""Context parallelism: a sequence cut over ranks, and attention that sees all of it.

Called by `apply` (which wraps the attention modules that the plan names) and by users through `context_attention`.
Hands on attention outputs for this rank's tokens; keys and values move by all-gather, ring or all-to-all.
"""
