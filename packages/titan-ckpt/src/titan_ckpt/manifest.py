"""The manifest: which files make up a checkpoint, how long they are and what they hash to.

It is written last. A folder is a checkpoint when it bears a step's name and holds a manifest that reads, and it is
sound when every file is as the manifest says. The manifest carries a digest of itself, so a bit that flips in it is
noticed as well.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from titan_ckpt.errors import CheckpointError
from titan_ckpt.tree import decode, digest

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS = "tensors"
Level = Literal["size", "checksum"]

# Only names that we would give ourselves: no root, no drive, no empty part; "." and ".." are looked for apart.
_SAFE_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")


@dataclass(frozen=True)
class FileRecord:
    """What is known of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What is known of one checkpoint."""

    step: int
    files: dict[str, FileRecord]  # by their name relative to the checkpoint, with "/"
    metadata: Any  # the caller's, encoded
    created: str  # UTC, ISO 8601
    titan_ckpt: str  # version
    torch: str  # version
    world_size: int

    def to_json(self) -> str:
        """Return the text of the manifest file."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps({**content, "digest": digest(content)}, indent=1)


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint in a folder.

    Attributes:
        step: the step it was saved at.
        path: its own folder.
        metadata: what was given to `save`.
    """

    step: int
    path: Path
    metadata: dict[str, Any]


def describe_file(path: Path) -> FileRecord:
    """Measure and hash a file.

    Args:
        path: the file.

    Returns:
        Its record.
    """
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(size=file.tell(), sha256=sha256)


def folder_name(step: int) -> str:
    """Return the name of a step's checkpoint, e.g. `step-00000100`."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step that a folder's name stands for, or None when it is no checkpoint's name."""
    digits = re.fullmatch(r"step-([0-9]{8,})", name)
    step = int(digits[1]) if digits else None
    # step-000000100 would be a second name for step 100.
    return step if step is not None and folder_name(step) == name else None


def read_manifest(path: Path) -> Manifest:
    """Read a checkpoint's manifest and check what can be checked without the other files.

    Args:
        path: the checkpoint's folder.

    Returns:
        The manifest.

    Raises:
        CheckpointError: when it is absent, does not read, is of an unknown format, or names files elsewhere.
    """
    file = path / MANIFEST
    try:
        content = json.loads(file.read_bytes())
        version = content["format_version"]
        if version == FORMAT_VERSION:
            return _checked(content, path)
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path.name}/{MANIFEST} does not read ({type(error).__name__}: {error})") from error
    raise CheckpointError(
        f"{path.name}/{MANIFEST} is of format {version!r} and this titan-ckpt reads {FORMAT_VERSION}: "
        "use the release that wrote it"
    )


def check_files(path: Path, manifest: Manifest, names: Iterable[str], level: Level) -> list[str]:
    """Compare files with what the manifest says of them.

    Args:
        path: the checkpoint's folder.
        manifest: its manifest.
        names: which of its files to look at.
        level: "size", or "checksum" to read them as well.

    Returns:
        What is wrong, one sentence per file; empty when all is well.
    """
    return [told for name in names if (told := _problem_with(path / name, name, manifest.files[name], level))]


def verify(path: str | Path, level: Level = "size") -> list[str]:
    """Check a checkpoint.

    Args:
        path: the checkpoint's folder.
        level: "size" looks at the manifest and the files' lengths, "checksum" also reads every byte.

    Returns:
        What is wrong with it, one sentence each; empty when it is sound.
    """
    if level not in ("size", "checksum"):
        raise ValueError(f'level must be "size" or "checksum", not {level!r}')
    path = Path(path)
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    return check_files(path, manifest, manifest.files, level)


def list_checkpoints(folder: str | Path) -> list[CheckpointInfo]:
    """List the checkpoints whose manifest reads; their other files are not looked at (see `verify`).

    Args:
        folder: where a Checkpointer saves; it need not exist.

    Returns:
        The checkpoints, oldest step first.
    """
    found = []
    for path in step_folders(Path(folder)):
        try:
            found.append(info_of(path, read_manifest(path)))
        except CheckpointError:
            continue
    return found


def step_folders(folder: Path) -> list[Path]:
    """Return the folders that bear a step's name, oldest step first, whatever they hold."""
    if not folder.is_dir():
        return []
    steps = {step: path for path in folder.iterdir() if (step := step_of(path.name)) is not None}
    return [steps[step] for step in sorted(steps)]


def info_of(path: Path, manifest: Manifest) -> CheckpointInfo:
    """Return what callers are told of a checkpoint."""
    return CheckpointInfo(step=manifest.step, path=path, metadata=decode(manifest.metadata))


def _checked(content: dict[str, Any], path: Path) -> Manifest:
    stated = content.pop("digest")
    if stated != digest(content):
        raise ValueError("it does not match its own digest")
    del content["format_version"]
    files = {name: FileRecord(**record) for name, record in content.pop("files").items()}
    for name in files:
        if not _SAFE_NAME.fullmatch(name) or {".", ".."} & set(name.split("/")):
            raise ValueError(f"it names the file {name!r}, which is not inside the checkpoint")
    manifest = Manifest(files=files, **content)
    if folder_name(manifest.step) != path.name:
        raise ValueError(f"it is of step {manifest.step}: was the folder renamed?")
    return manifest


def _problem_with(path: Path, name: str, record: FileRecord, level: Level) -> str | None:
    try:
        size = path.stat().st_size
        if size != record.size:
            return f"{name} has {size} bytes instead of {record.size}"
        if level == "checksum" and describe_file(path) != record:
            return f"{name} does not match its checksum"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} does not read ({error})"
    return None
