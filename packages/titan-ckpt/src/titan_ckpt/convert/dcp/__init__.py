"""Directories of torch.distributed.checkpoint (DCP), read without unpickling anything, and written.

Called by `convert.formats` (reading) and the `convert` command (writing).
The readers return a `TensorSource`; nothing here executes what a file contains.
"""
