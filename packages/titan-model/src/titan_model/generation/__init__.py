"""Text from a model: the sampling loop and how the next token is chosen.

Called by users (`generate`) and by titan-train for samples.
Hands on token ids; the loop keeps a `KVCache` of `layers`.
"""
