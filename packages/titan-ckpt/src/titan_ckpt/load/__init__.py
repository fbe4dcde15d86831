"""From a checkpoint to tensors: which one, what of it, and checksummed reads into the caller's memory.

Called by `Checkpointer.load` (collective) and `open_checkpoint` (one process).
Hands on filled state dicts and a `Loaded` that says what was loaded and what was passed over.
"""
