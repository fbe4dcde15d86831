"""The manifest: the files of a checkpoint with their sizes and checksums, and the checkpoint's lineage.

It is written last. A directory is a checkpoint if it has a step's name and holds a readable manifest; the checkpoint is
valid if every file is as the manifest says. The manifest contains a digest of itself, so a flipped bit in it is
detected as well.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.checksum import ALGORITHM, checksum
from titan_ckpt.format.json_values import check_values, decode, reject_duplicates
from titan_ckpt.messages import reason_of
from titan_ckpt.storage.base import Storage

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
MANIFEST_LIMIT = 1 << 28
# Entries of the caller's `metadata` that are copied to the manifest's lineage.
LINEAGE_FROM_METADATA = ("tokens_seen", "config_digest", "data_fingerprint", "layout")

# No absolute path, no drive, no empty part; "." and ".." are checked for separately.
_SAFE_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")
_HASH = re.compile(r"[0-9a-f]{32}")


# The branches that lead to a checkpoint, oldest first: name, and last step on the way (None for its own branch).
Branches = tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of one file.

    Attributes:
        size: Length in bytes.
        checksum: XXH3-128 of the content in hexadecimal.
    """

    size: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """The manifest of one checkpoint.

    Attributes:
        step: The step it was saved at.
        created: Time of the save (UTC, ISO 8601).
        files: Its other files, by their path inside the checkpoint.
        lineage: Where it comes from: tokens_seen, parent (step and digest), branches, config_digest, data_fingerprint,
            layout, world_size, versions. Entries that are not known are None.
        metrics: The numbers given to `save`, by which checkpoints are compared.
        metadata: The metadata given to `save`.
        digest: Checksum of all of the above.
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
        """Total size of its files in bytes."""
        return sum(record.size for record in self.files.values())

    @property
    def branches(self) -> Branches:
        """The branches that lead to it, oldest first, each with its last step on the way; empty if it has none."""
        return tuple((name, last) for name, last in self.lineage.get("branches") or ())


class ManifestText(NamedTuple):
    """A serialized manifest.

    Attributes:
        text: The content of the file.
        digest: The manifest's digest.
    """

    text: bytes
    digest: str


def manifest_text(
    *,
    step: int,
    created: str,
    files: Mapping[str, FileRecord],
    lineage: Mapping[str, Any],
    metrics: Mapping[str, float],
    metadata: Any,
) -> ManifestText:
    """Serialize a manifest.

    Args:
        step: The step.
        created: The time (UTC, ISO 8601).
        files: The other files, by their path inside the checkpoint.
        lineage: See `Manifest`.
        metrics: See `Manifest`.
        metadata: The caller's metadata, encoded.

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
    """Return the checksum of a JSON value; the order of keys does not matter."""
    return checksum(json.dumps(content, sort_keys=True).encode())


def directory_name(step: int) -> str:
    """Return the directory name of a step's checkpoint, e.g. `step-00000100`."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint's directory name, or None if it is not such a name."""
    digits = re.fullmatch(r"step-([0-9]{8,18})", name)
    step = int(digits[1]) if digits else None
    # step-000000100 would be a second name for step 100.
    return step if step is not None and directory_name(step) == name else None


def read_manifest(storage: Storage, name: str) -> Manifest:
    """Read a checkpoint's manifest and check everything that does not need the other files.

    Args:
        storage: The directory of checkpoints.
        name: The checkpoint's name; if that is a step's name, the manifest must be of that step.

    Returns:
        The manifest.

    Raises:
        CheckpointError: If it is absent, invalid, of an unknown format version, or names files outside the checkpoint.
    """
    path = f"{name}/{MANIFEST}"
    try:
        content = json.loads(storage.read(path, most=MANIFEST_LIMIT), object_pairs_hook=reject_duplicates)
        version = content["format_version"]
        if version == FORMAT_VERSION:
            return _checked(content, name)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{name} has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({reason_of(error)})") from error
    raise CheckpointError(
        f"{path} has format version {version!r}, this titan-ckpt reads {FORMAT_VERSION}: use the release that wrote it"
    )


def _checked(content: dict[str, Any], name: str) -> Manifest:
    stated = content.pop("digest")
    if stated != digest_of(content):
        raise ValueError("it does not match its own digest")
    del content["format_version"]
    algorithm = content.pop("checksum")
    if algorithm != ALGORITHM:
        raise ValueError(f"unknown checksum algorithm {algorithm!r}")
    files = {path: _record(path, described) for path, described in content.pop("files").items()}
    for kind in ("lineage", "metrics", "metadata"):
        if not isinstance(content[kind], dict):
            raise ValueError(f"{kind} is not an object")
    if any(type(value) not in (int, float) for value in content["metrics"].values()):
        raise ValueError("a metric is not a number")
    content["metrics"] = {metric: _within_float(value) for metric, value in content["metrics"].items()}
    if type(content["created"]) is not str:
        raise ValueError(f"invalid time {content['created']!r}")
    check_values([content["lineage"], content["metadata"]])
    _check_branches(content["lineage"].get("branches") or [])
    if STATE not in files:
        raise ValueError(f"it does not list {STATE}")
    step = content["step"]
    if type(step) is not int or step < 0:
        raise ValueError(f"invalid step {step!r}")
    if name.startswith("step-") and directory_name(step) != name:
        raise ValueError(f"it is of step {step}: was the directory renamed?")
    return Manifest(files=files, digest=stated, **{**content, "metadata": decode(content["metadata"])})


def _record(path: str, described: dict[str, Any]) -> FileRecord:
    if not _SAFE_NAME.fullmatch(path) or {".", ".."} & set(path.split("/")) or path == MANIFEST:
        raise ValueError(f"it names the file {path!r}, which is not inside the checkpoint")
    record = FileRecord(**described)
    if type(record.size) is not int or not 0 <= record.size < 1 << 63 or not _HASH.fullmatch(record.checksum):
        raise ValueError(f"invalid size or checksum for {path!r}")
    return record


def _within_float(value: float) -> float:
    """Return a number unchanged; raise OverflowError if it is an integer that no float can be compared with."""
    float(value)
    return value


def _check_branches(branches: Any) -> None:
    valid = isinstance(branches, list) and all(isinstance(branch, list) and len(branch) == 2 for branch in branches)
    if not valid or any(type(name) is not str or type(last) not in (int, type(None)) for name, last in branches):
        raise ValueError("its branches are not a list of names with steps")
