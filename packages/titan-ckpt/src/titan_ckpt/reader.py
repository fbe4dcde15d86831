"""One load: from a folder to the newest sound checkpoint, and from there into the caller's objects."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_ckpt.collective import Ranks
from titan_ckpt.errors import CheckpointError
from titan_ckpt.index import describe, files_in, mismatches
from titan_ckpt.manifest import (
    STATE,
    TENSORS,
    CheckpointInfo,
    Manifest,
    check_files,
    folder_name,
    info_of,
    read_manifest,
    step_folders,
)
from titan_ckpt.tree import Stateful, merge, split

logger = logging.getLogger(__name__)


def find_checkpoint(ranks: Ranks, folder: Path, step: int | None) -> Path | None:
    """Find the checkpoint to load; collective.

    Args:
        ranks: who takes part; each checks its share of the files.
        folder: where the checkpoints are.
        step: the one wanted; None for the newest sound one.

    Returns:
        Its folder, or None when no step was asked for and there is no checkpoint at all.

    Raises:
        CheckpointError: when the step asked for is absent or damaged, or when all that is there is.
    """
    if step is not None:
        path = folder / folder_name(step)
        problems = problems_of(ranks, path)
        if problems:
            raise CheckpointError(
                f"{path} cannot be loaded: {'; '.join(problems)}. {_others(ranks, folder)}"
                "Give no step to load the newest sound checkpoint"
            )
        return path
    paths, strangers = ranks.on_first(f"list {folder}", lambda: _candidates(folder))
    for path in paths:
        problems = problems_of(ranks, path)
        if not problems:
            return path
        if ranks.rank == 0:
            logger.warning("%s is damaged and passed over: %s", path, "; ".join(problems))
    if paths or strangers:
        names = ", ".join([path.name for path in paths] + strangers)
        raise CheckpointError(
            f"{folder} holds no sound checkpoint, but {names}: the warnings and titan_ckpt.verify say what is "
            "wrong with each. Restore them, or give another folder to start afresh"
        )
    return None


def problems_of(ranks: Ranks, path: Path) -> list[str]:
    """Check a checkpoint, every byte of it, each rank its share of the files; collective.

    Args:
        ranks: who takes part.
        path: the checkpoint's folder.

    Returns:
        What is wrong with it, the same on all ranks; empty when it is sound.
    """
    manifest, problem = ranks.on_first(f"read the manifest of {path}", lambda: _read_or_tell(path))
    if manifest is None:
        return [problem]
    # The largest first, dealt out one by one: the ranks read about as much each.
    names = sorted(manifest.files, key=lambda name: -manifest.files[name].size)
    found = ranks.together(
        f"check {path}", lambda: check_files(path, manifest, names[ranks.rank :: ranks.world], "checksum")
    )
    return [told for part in ranks.all_gather(found) for told in part]


def restore(ranks: Ranks, path: Path, state: Mapping[str, Stateful]) -> CheckpointInfo:
    """Load a checkpoint that was found sound into `state`; collective.

    Args:
        ranks: who takes part.
        path: the checkpoint's folder.
        state: what to fill, by top-level name.

    Returns:
        What is known of the checkpoint.

    Raises:
        CheckpointError: when it does not hold just what `state` asks for; nothing was changed then.
    """
    # DCP brings sympy and two seconds of import with it: only those who save or load pay.
    from titan_ckpt.tensors import read_tensors

    manifest, values, index = ranks.on_first(f"read {path}", lambda: _read_json(path))
    tensors, _ = ranks.together("collect the state to load into", lambda: split(state))
    wanted = describe(ranks, tensors)
    ranks.on_first(f"load {path}", lambda: _raise_any(mismatches(list(state), wanted, values, index)))
    ranks.together(f"read the tensors of {path}", lambda: read_tensors(path / TENSORS, index, tensors))

    def hand_over() -> None:
        for name, part in state.items():
            part.load_state_dict(merge(name, values, tensors))

    ranks.together(f"load the state of {path}", hand_over)
    return info_of(path, manifest)


def _candidates(folder: Path) -> tuple[list[Path], list[str]]:
    """Return what may be checkpoints, newest first, and what is called like one but is none."""
    paths = step_folders(folder)[::-1]
    known = {path.name for path in paths}
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return paths, [name for name in names if name.startswith("step-") and name not in known]


def _others(ranks: Ranks, folder: Path) -> str:
    steps = ranks.on_first(f"list {folder}", lambda: [path.name for path in step_folders(folder)])
    return f"The folder holds {', '.join(steps)}. " if steps else "The folder holds no checkpoint. "


def _read_or_tell(path: Path) -> tuple[Manifest | None, str]:
    if not path.exists():
        return None, "it does not exist"
    try:
        return read_manifest(path), ""
    except CheckpointError as error:
        return None, str(error)


def _read_json(path: Path) -> tuple[Manifest, dict[str, Any], dict[str, Any]]:
    manifest = read_manifest(path)
    content = json.loads((path / STATE).read_bytes())
    unlisted = sorted(name for name in files_in(content["tensors"]) if f"{TENSORS}/{name}" not in manifest.files)
    if unlisted:
        raise CheckpointError(f"{STATE} refers to {unlisted[0]!r}, which the manifest does not list")
    return manifest, content["values"], content["tensors"]


def _raise_any(problems: str) -> None:
    if problems:
        raise CheckpointError(problems)
