"""Text generation: the token loop and how the next token is drawn from logits.

Called by users (`generate`) and by titan-train for samples (`sample`).
Hands on token ids; the loop keeps a `KVCache` of `layers`.
"""
