"""A nested state dict as flat names, and the pieces of its tensors that this rank holds.

Called by `save` (what to write) and `load` (what to fill).
Hands on plain local tensors with their place in the global one, whatever DTensor layout they came from.
"""
