"""The index: which tensors a checkpoint holds, and how that compares with what is asked for.

It is JSON, and names every tensor with its type, its global shape, and where its chunks lie.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from titan_ckpt.collective import Ranks
from titan_ckpt.tree import digest, parts_of

# key -> {"dtype": "float32", "shape": [...], "chunks": [{"offsets", "sizes", "file", "start", "length"}, ...]}
Index = dict[str, dict[str, Any]]
# key -> (dtype, global shape)
Description = dict[str, tuple[str, list[int]]]


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name, e.g. `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def files_in(index: Index) -> set[str]:
    """Return the names of the files that the index refers to."""
    return {chunk["file"] for entry in index.values() for chunk in entry["chunks"]}


def describe(ranks: Ranks, tensors: Mapping[str, torch.Tensor]) -> list[Description]:
    """Bring to rank 0 what all ranks want to load; collective.

    Args:
        ranks: who takes part.
        tensors: this rank's tensors by key.

    Returns:
        On rank 0 each description that differs from the others (under FSDP there is but one), an empty list elsewhere.
    """
    own = {key: (dtype_name(tensor.dtype), list(tensor.shape)) for key, tensor in tensors.items()}
    digests = ranks.all_gather(digest(own))
    first_of_its_kind = digests.index(digests[ranks.rank]) == ranks.rank
    return [told for told in ranks.gather(own if first_of_its_kind else None) if told is not None]


def mismatches(names: Iterable[str], wanted: list[Description], values: Mapping[str, Any], index: Index) -> str:
    """Compare what is asked for with what a checkpoint holds.

    Args:
        names: the top-level entries asked for.
        wanted: the tensors asked for, as `describe` returns them.
        values: the checkpoint's JSON by top-level entry.
        index: the checkpoint's tensors.

    Returns:
        All differences in one text, by kind; empty when there are none. Entries that were not asked for are none.
    """
    asked = set(names)
    absent = asked - set(values) - {parts_of(key)[0] for key in index}
    missing = {f"{name} (the whole entry)" for name in absent}
    differing: set[str] = set()
    expected: set[str] = set()
    for description in wanted:
        expected |= description.keys()
        for key, (dtype, shape) in description.items():
            if parts_of(key)[0] in absent:
                continue
            if key not in index:
                missing.add(key)
            elif (index[key]["dtype"], index[key]["shape"]) != (dtype, shape):
                held = f"{index[key]['dtype']} {index[key]['shape']}"
                differing.add(f"{key}: {held} in the checkpoint, {dtype} {shape} asked for")
    unexpected = {key for key in index if key not in expected and parts_of(key)[0] in asked}
    groups = {
        "missing in the checkpoint": missing,
        "unexpected, in the checkpoint but not asked for": unexpected,
        "of another shape or type": differing,
    }
    if not any(groups.values()):
        return ""
    lines = ["it does not fit the state to load into. Load into what was saved, or leave the entry out."]
    for title, keys in groups.items():
        if keys:
            lines += [f"  {title} ({len(keys)}):", *(f"    {key}" for key in sorted(keys))]
    return "\n".join(lines)
