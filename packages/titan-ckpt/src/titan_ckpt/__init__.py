"""Checkpoints that are published atomically and checked before they are loaded."""
