"""What is done with finished checkpoints: list, pin, verify, remove.

Called by the command line, by `save` (retention) and by `load` (to choose a checkpoint).
Hands on `CheckpointInfo` records and lists of problems; `listing` and `retention` do not import torch.
"""
