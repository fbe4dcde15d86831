"""The parts of a decoder block: attention and its back-ends, masks, RoPE, norms, feed-forward, LM head.

Called by `decoder` (and `moe`), which composes them into blocks.
Each is an `nn.Module` or a function of tensors that knows nothing about the blocks around it.
"""
