"""From a checkpoint to tensors: choose the checkpoint, select names, read with checksums into the caller's memory.

Called by `Checkpointer.load` (collective) and `open_checkpoint` (one process).
Hands on filled state dicts and a `Loaded` that says what was loaded and which checkpoints were skipped.
"""
