"""Checkpoints that cannot be half there, hide no damage, run no code, and load on any layout."""

from titan_ckpt.catalog import CheckpointInfo, list_checkpoints, pin, unpin
from titan_ckpt.checking import verify
from titan_ckpt.checkpointer import Checkpointer, Exporter
from titan_ckpt.errors import CheckpointError
from titan_ckpt.foreign.formats import open_source
from titan_ckpt.foreign.huggingface_out import HuggingFaceExport, export
from titan_ckpt.foreign.load import load_into
from titan_ckpt.foreign.titan_out import import_weights
from titan_ckpt.foreign.torch_file import export_torch
from titan_ckpt.index import Chunk, TensorSpec
from titan_ckpt.loading import Loaded
from titan_ckpt.manifest import Manifest
from titan_ckpt.reader import CheckpointReader, open_checkpoint
from titan_ckpt.retention import KeepBest, PrunePlan, Retention, plan_prune
from titan_ckpt.source import TensorSource
from titan_ckpt.tree import Stateful
from titan_ckpt.weight_map import TensorRule, WeightMap

__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "CheckpointReader",
    "Checkpointer",
    "Chunk",
    "Exporter",
    "HuggingFaceExport",
    "KeepBest",
    "Loaded",
    "Manifest",
    "PrunePlan",
    "Retention",
    "Stateful",
    "TensorRule",
    "TensorSource",
    "TensorSpec",
    "WeightMap",
    "export",
    "export_torch",
    "import_weights",
    "list_checkpoints",
    "load_into",
    "open_checkpoint",
    "open_source",
    "pin",
    "plan_prune",
    "unpin",
    "verify",
]
