"""Parallel training of any nn.Module over a device mesh."""
