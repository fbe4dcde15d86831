"""Checkpoints that cannot be half there, hide no damage, run no code, and load on any layout."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Where each name is at home. It is imported when it is first asked for: torch takes seconds to import, and who only
# lists checkpoints, or clears them away, does without.
_HOMES = {
    "CheckpointInfo": "titan_ckpt.catalog",
    "list_checkpoints": "titan_ckpt.catalog",
    "pin": "titan_ckpt.catalog",
    "unpin": "titan_ckpt.catalog",
    "verify": "titan_ckpt.checking",
    "Checkpointer": "titan_ckpt.checkpointer",
    "Exporter": "titan_ckpt.checkpointer",
    "CheckpointError": "titan_ckpt.errors",
    "open_source": "titan_ckpt.foreign.formats",
    "HuggingFaceExport": "titan_ckpt.foreign.huggingface_out",
    "export": "titan_ckpt.foreign.huggingface_out",
    "load_into": "titan_ckpt.foreign.load",
    "import_weights": "titan_ckpt.foreign.titan_out",
    "export_torch": "titan_ckpt.foreign.torch_file",
    "Chunk": "titan_ckpt.index",
    "TensorSpec": "titan_ckpt.index",
    "Loaded": "titan_ckpt.loading",
    "Manifest": "titan_ckpt.manifest",
    "CheckpointReader": "titan_ckpt.reader",
    "open_checkpoint": "titan_ckpt.reader",
    "KeepBest": "titan_ckpt.retention",
    "PrunePlan": "titan_ckpt.retention",
    "Retention": "titan_ckpt.retention",
    "plan_prune": "titan_ckpt.retention",
    "TensorSource": "titan_ckpt.source",
    "Stateful": "titan_ckpt.tree",
    "TensorRule": "titan_ckpt.weight_map",
    "WeightMap": "titan_ckpt.weight_map",
}

if not TYPE_CHECKING:  # or type checkers would take every name for one of this package

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
