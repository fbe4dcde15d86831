"""Checkpoints that are published atomically and checked before they are loaded."""

from titan_ckpt.checkpointer import Checkpointer
from titan_ckpt.errors import CheckpointError
from titan_ckpt.manifest import CheckpointInfo, list_checkpoints, verify
from titan_ckpt.tree import Stateful

__all__ = ["CheckpointError", "CheckpointInfo", "Checkpointer", "Stateful", "list_checkpoints", "verify"]
