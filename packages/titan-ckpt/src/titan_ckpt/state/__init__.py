"""A nested state dict as flat names, and the shards of its tensors that this rank holds.

Called by `save` (what to write) and `load` (what to fill).
Hands on regular local tensors with their position in the global one, whatever the DTensor layout.
"""
