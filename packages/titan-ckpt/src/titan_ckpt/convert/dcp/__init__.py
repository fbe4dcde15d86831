"""torch.distributed.checkpoint folders, read without unpickling anything, and written.

Called by `convert.formats` (reading) and the `convert` command (writing).
The readers hand on a `TensorSource`; nothing in here executes what a file says.
"""
