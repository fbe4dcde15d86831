"""The parts of a decoder block: attention and its backends, masks, RoPE, norms, feed-forward, LM head.

Called by `decoder` (and `moe`), which composes them into blocks.
Each is an `nn.Module` or a function of tensors that knows nothing of the blocks around it.
"""
