"""The manifest: which files make up a checkpoint, how long they are, what they hash to, and where it all comes from.

It is written last. A folder is a checkpoint when it bears a step's name and holds a manifest that reads, and it is
sound when every file is as the manifest says. The manifest carries a digest of itself, so a bit that flips in it is
noticed as well.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.checksum import ALGORITHM, checksum
from titan_ckpt.format.json_values import check_values, decode, unique
from titan_ckpt.storage.base import Storage

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
MANIFEST_LIMIT = 1 << 28
# What the caller may tell of a checkpoint's origin, as entries of `metadata`.
LINEAGE_FROM_METADATA = ("tokens_seen", "config_digest", "data_fingerprint", "layout")

# Only names that we would give ourselves: no root, no drive, no empty part; "." and ".." are looked for apart.
_SAFE_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")
_HASH = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class FileRecord:
    """What is known of one file.

    Attributes:
        size: its length in bytes.
        checksum: the XXH3-128 of its content in hexadecimal.
    """

    size: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """What is known of one checkpoint.

    Attributes:
        step: the step it was saved at.
        created: when, UTC, ISO 8601.
        files: its other files, by their path inside it.
        lineage: where it comes from: tokens_seen, parent (step and digest), config_digest, data_fingerprint, layout,
            world_size, versions. What nobody told is None.
        metrics: the numbers given at save, by which checkpoints are compared.
        metadata: the caller's words.
        digest: the checksum of all of this.
    """

    step: int
    created: str
    files: dict[str, FileRecord]
    lineage: dict[str, Any]
    metrics: dict[str, float]
    metadata: dict[str, Any]
    digest: str

    @property
    def nbytes(self) -> int:
        """How many bytes its files have together."""
        return sum(record.size for record in self.files.values())


class ManifestText(NamedTuple):
    """A manifest as it is written.

    Attributes:
        text: the content of the file.
        digest: what it says of itself.
    """

    text: bytes
    digest: str


def manifest_text(
    step: int,
    created: str,
    files: Mapping[str, FileRecord],
    lineage: Mapping[str, Any],
    metrics: Mapping[str, float],
    metadata: Any,
) -> ManifestText:
    """Write a manifest.

    Args:
        step: the step.
        created: the time, UTC, ISO 8601.
        files: the other files by their path inside the checkpoint.
        lineage: see `Manifest`.
        metrics: see `Manifest`.
        metadata: the caller's words, encoded.

    Returns:
        The content of the manifest file, and its digest.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "created": created,
        "checksum": ALGORITHM,
        "files": {name: asdict(record) for name, record in files.items()},
        "lineage": dict(lineage),
        "metrics": dict(metrics),
        "metadata": metadata,
    }
    digest = digest_of(content)
    return ManifestText(json.dumps({**content, "digest": digest}, indent=1).encode(), digest)


def digest_of(content: Any) -> str:
    """Return the checksum of a JSON value, whatever the order of its dicts' keys."""
    return checksum(json.dumps(content, sort_keys=True).encode())


def folder_name(step: int) -> str:
    """Return the name of a step's checkpoint, e.g. `step-00000100`."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step that a folder's name stands for, or None when it is no checkpoint's name."""
    digits = re.fullmatch(r"step-([0-9]{8,18})", name)
    step = int(digits[1]) if digits else None
    # step-000000100 would be a second name for step 100.
    return step if step is not None and folder_name(step) == name else None


def read_manifest(storage: Storage, name: str) -> Manifest:
    """Read a checkpoint's manifest and check what can be checked without the other files.

    Args:
        storage: the folder the checkpoint lies in.
        name: its name there; when that is a step's name, the manifest must be of that step.

    Returns:
        The manifest.

    Raises:
        CheckpointError: when it is absent, does not read, is of an unknown format, or names files elsewhere.
    """
    path = f"{name}/{MANIFEST}"
    try:
        size = storage.size(path)
        if size > MANIFEST_LIMIT:
            raise ValueError(f"it has {size} bytes, more than any manifest")
        content = json.loads(storage.read(path), object_pairs_hook=unique)
        version = content["format_version"]
        if version == FORMAT_VERSION:
            return _checked(content, name)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{name} has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} does not read ({type(error).__name__}: {error})") from error
    raise CheckpointError(
        f"{path} is of format {version!r} and this titan-ckpt reads {FORMAT_VERSION}: use the release that wrote it"
    )


def _checked(content: dict[str, Any], name: str) -> Manifest:
    stated = content.pop("digest")
    if stated != digest_of(content):
        raise ValueError("it does not match its own digest")
    del content["format_version"]
    algorithm = content.pop("checksum")
    if algorithm != ALGORITHM:
        raise ValueError(f"its checksums are {algorithm!r}, which this release does not know")
    files = {path: _record(path, described) for path, described in content.pop("files").items()}
    for kind in ("lineage", "metrics", "metadata"):
        if not isinstance(content[kind], dict):
            raise ValueError(f"{kind} is no object")
    if any(type(value) not in (int, float) for value in content["metrics"].values()):
        raise ValueError("metrics are numbers")
    check_values([content["lineage"], content["metadata"]])
    if STATE not in files:
        raise ValueError(f"it lists no {STATE}")
    step = content["step"]
    if type(step) is not int or step < 0:
        raise ValueError(f"its step is {step!r}")
    if name.startswith("step-") and folder_name(step) != name:
        raise ValueError(f"it is of step {step}: was the folder renamed?")
    return Manifest(files=files, digest=stated, **{**content, "metadata": decode(content["metadata"])})


def _record(path: str, described: dict[str, Any]) -> FileRecord:
    if not _SAFE_NAME.fullmatch(path) or {".", ".."} & set(path.split("/")) or path == MANIFEST:
        raise ValueError(f"it names the file {path!r}, which is not inside the checkpoint")
    record = FileRecord(**described)
    if type(record.size) is not int or record.size < 0 or not _HASH.fullmatch(record.checksum):
        raise ValueError(f"what it says of {path!r} is no size and checksum")
    return record
