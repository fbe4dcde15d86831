"""Atomic, checksummed, pickle-free checkpoints that reshard on load.

```
Checkpointer.save                               Checkpointer.load, open_checkpoint
      |                                                   ^
      v                                                   |
   state    state dicts -> names, local shards         state    values merged into state dicts
      |                                                   ^
      v                                                   |
   save     snapshot, who writes what, files           load     choose, compare, read with checksums
      |                                                   ^
      v                                                   |
   format   safetensors files, state.json, manifest    format   parsed and checked against one another
      |                                                   ^
      v                                                   |
   storage  publish: from here on it is valid   --->   storage  directory or object store
      |
      v
   manage   list, pin, verify, prune

   convert  Hugging Face, DCP, torch.save, Meta  <-> TensorSource <->  a checkpoint
   cli      the command `titan-ckpt`
```

`save.saving` prepares a save, `save.in_flight` runs it to its end, whoever waits for it. `manage.lineage` decides which
checkpoints are the run's.
`collective` lets the ranks do each step together: an error on one rank becomes a CheckpointError on all.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titan_ckpt.checkpointer import Checkpointer
    from titan_ckpt.convert.formats import open_source
    from titan_ckpt.convert.huggingface.writer import HuggingFaceExport, export
    from titan_ckpt.convert.load_into import load_into
    from titan_ckpt.convert.source import TensorSource
    from titan_ckpt.convert.titan_writer import import_weights
    from titan_ckpt.convert.torch_file import export_torch
    from titan_ckpt.convert.weight_map import TensorRule, WeightMap
    from titan_ckpt.errors import CheckpointError
    from titan_ckpt.format.index import Chunk, TensorSpec
    from titan_ckpt.format.manifest import Manifest
    from titan_ckpt.load.loading import Loaded
    from titan_ckpt.load.reader import CheckpointReader, open_checkpoint
    from titan_ckpt.manage.lineage import Restored, restore
    from titan_ckpt.manage.listing import CheckpointInfo, list_checkpoints, pin, unpin
    from titan_ckpt.manage.retention import KeepBest, PrunePlan, Retention, plan_prune
    from titan_ckpt.manage.verify import verify
    from titan_ckpt.save.in_flight import SaveEnd
    from titan_ckpt.save.saving import Exporter
    from titan_ckpt.state.tree import Stateful

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
    "Restored",
    "Retention",
    "SaveEnd",
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
    "restore",
    "unpin",
    "verify",
]

# Lazy exports: importing torch takes seconds and is not needed to list or prune checkpoints.
_MODULES = {
    "CheckpointInfo": "titan_ckpt.manage.listing",
    "list_checkpoints": "titan_ckpt.manage.listing",
    "pin": "titan_ckpt.manage.listing",
    "unpin": "titan_ckpt.manage.listing",
    "Restored": "titan_ckpt.manage.lineage",
    "restore": "titan_ckpt.manage.lineage",
    "verify": "titan_ckpt.manage.verify",
    "Checkpointer": "titan_ckpt.checkpointer",
    "Exporter": "titan_ckpt.save.saving",
    "CheckpointError": "titan_ckpt.errors",
    "open_source": "titan_ckpt.convert.formats",
    "HuggingFaceExport": "titan_ckpt.convert.huggingface.writer",
    "export": "titan_ckpt.convert.huggingface.writer",
    "load_into": "titan_ckpt.convert.load_into",
    "import_weights": "titan_ckpt.convert.titan_writer",
    "export_torch": "titan_ckpt.convert.torch_file",
    "Chunk": "titan_ckpt.format.index",
    "TensorSpec": "titan_ckpt.format.index",
    "Loaded": "titan_ckpt.load.loading",
    "Manifest": "titan_ckpt.format.manifest",
    "CheckpointReader": "titan_ckpt.load.reader",
    "open_checkpoint": "titan_ckpt.load.reader",
    "KeepBest": "titan_ckpt.manage.retention",
    "PrunePlan": "titan_ckpt.manage.retention",
    "Retention": "titan_ckpt.manage.retention",
    "plan_prune": "titan_ckpt.manage.retention",
    "TensorSource": "titan_ckpt.convert.source",
    "SaveEnd": "titan_ckpt.save.in_flight",
    "Stateful": "titan_ckpt.state.tree",
    "TensorRule": "titan_ckpt.convert.weight_map",
    "WeightMap": "titan_ckpt.convert.weight_map",
}

if not TYPE_CHECKING:  # otherwise type checkers would accept any name of this package

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
