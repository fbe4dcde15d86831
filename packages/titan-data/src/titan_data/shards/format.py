"""The format of token shards, version 1: a shard's header and a folder's manifest (see docs/token-shards.md)."""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from titan_data.errors import DataError
from titan_data.fingerprint import Fingerprint

VERSION = 1
MAGIC = b"TITANTOK"
HEADER_SIZE = 4096  # a page: the tokens after it are aligned in memory
_PREFIX = struct.Struct("<8sII")  # magic, version, bytes of JSON
_DIGEST_SIZE = 32
_MAX_JSON = HEADER_SIZE - _PREFIX.size - _DIGEST_SIZE

MANIFEST = "index.json"
OFFSETS = "document-offsets.u64"  # where each document of the folder begins, and where the last one ends
INPUTS = "inputs.json"  # versions of the files that the folder was made from, if it was made from files
UNFINISHED = "prepare.json"  # the job of an unfinished folder; removed when the manifest is written


def shard_name(number: int) -> str:
    """Return the file name of a shard; up to a million shards sort by name."""
    return f"shard-{number:06d}.tokens"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smaller of the two little-endian types that fits every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def offsets_start(tokens: int, dtype: np.dtype[Any]) -> int:
    """Return where in a shard the documents' offsets begin, in bytes: after the tokens, at a multiple of 8."""
    return HEADER_SIZE + -(-tokens * dtype.itemsize // 8) * 8


def shard_size(documents: int, tokens: int, dtype: np.dtype[Any]) -> int:
    """Return the size of a shard's file in bytes."""
    return offsets_start(tokens, dtype) + 8 * (documents + 1)


@dataclass(frozen=True)
class Header:
    """A shard's header.

    Attributes:
        vocab_size: Every id is below it; determines the type of the tokens.
        tokenizer: Fingerprint of the tokenizer that made the tokens.
        first_document: Number of its first document in the folder.
        documents: Number of documents.
        tokens: Number of tokens.
        source_end: `(shard, document)` of the text source, where the next shard begins.
        sha256: Checksum of everything after the header.
    """

    vocab_size: int
    tokenizer: str
    first_document: int
    documents: int
    tokens: int
    source_end: tuple[int, int]
    sha256: str

    def entry(self, number: int) -> "ShardEntry":
        """Return the entry of the manifest for this shard, which is number `number` of its folder."""
        return ShardEntry(shard_name(number), self.documents, self.tokens, self.sha256)

    def pack(self) -> bytes:
        """Serialize the header as the first `HEADER_SIZE` bytes of the file."""
        text = json.dumps(asdict(self), sort_keys=True).encode()
        if len(text) > _MAX_JSON:
            raise DataError(
                f"the tokenizer fingerprint of {len(self.tokenizer)} characters does not fit into a shard's header"
            )
        page = (_PREFIX.pack(MAGIC, VERSION, len(text)) + text).ljust(HEADER_SIZE - _DIGEST_SIZE, b"\0")
        return page + hashlib.sha256(page).digest()

    @classmethod
    def unpack(cls, page: bytes, name: str) -> Self:
        """Parse the first `HEADER_SIZE` bytes of a file.

        Args:
            page: The bytes.
            name: The file's name, for messages.

        Returns:
            The header.

        Raises:
            DataError: If the file is not a shard, of another version, or corrupt.
        """
        if page[: len(MAGIC)] != MAGIC:
            raise DataError(f"{name} is not a token shard, or its header is corrupt: it does not begin with {MAGIC!r}")
        if len(page) < HEADER_SIZE:
            raise DataError(f"{name} is truncated: it has {len(page)} bytes, less than a header")
        _, version, length = _PREFIX.unpack_from(page)
        if hashlib.sha256(page[:-_DIGEST_SIZE]).digest() != page[-_DIGEST_SIZE:]:
            raise DataError(f"the header of {name} is corrupt: its checksum does not match")
        if version != VERSION:
            raise DataError(
                f"{name} has version {version}, but this titan-data reads version {VERSION}: upgrade titan-data"
            )
        fields = json.loads(page[_PREFIX.size : _PREFIX.size + length])
        return cls(**{**fields, "source_end": tuple(fields["source_end"])})


@dataclass(frozen=True)
class Job:
    """Everything that the contents of a folder depend on; an unfinished folder of another job is not resumed.

    Attributes:
        source: Fingerprint of the text source.
        tokenizer: Fingerprint of the tokenizer.
        vocab_size: Vocabulary size of the tokenizer.
        bos_id: The first token of each document, if any.
        eos_id: The last token of each document, if any.
        pad_id: The padding token, if any; never in a shard.
        shard_tokens: Maximum number of tokens of a shard, unless a single document has more.
        part: `(index, count)` if the folder contains one of several parts of the source.
    """

    source: Fingerprint
    tokenizer: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    shard_tokens: int
    part: tuple[int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the job as JSON values."""
        fields = {**vars(self), "source": self.source.to_json()}
        return fields if self.part is not None else {key: fields[key] for key in fields if key != "part"}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """Create a job from what `to_json` returned."""
        part = {"part": tuple(saved["part"])} if "part" in saved else {}
        return cls(**{**saved, "source": Fingerprint.from_json(saved["source"]), **part})


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the manifest.

    Attributes:
        name: Its path, relative to the folder of the manifest; of joined parts it begins with the part's folder.
        documents: Number of documents.
        tokens: Number of tokens.
        sha256: The checksum in its header.
    """

    name: str
    documents: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The manifest of a finished folder.

    Attributes:
        job: What the folder was made from.
        shards: The shards in the order of their documents.
        offsets_sha256: Checksum of the file of all documents' offsets.
    """

    job: Job
    shards: tuple[ShardEntry, ...]
    offsets_sha256: str

    @property
    def documents(self) -> int:
        """Number of documents."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(shard.tokens for shard in self.shards)

    def first_documents(self) -> list[int]:
        """Return the number of each shard's first document in the folder that the shard was written to."""
        found: list[int] = []
        folder, documents = "", 0
        for shard in self.shards:
            if (name := shard.name.rpartition("/")[0]) != folder:
                folder, documents = name, 0
            found.append(documents)
            documents += shard.documents
        return found

    def pack(self) -> bytes:
        """Serialize the manifest as the contents of its file."""
        body = {
            "format": "titan-data token shards",
            "version": VERSION,
            "dtype": token_dtype(self.job.vocab_size).name,
            "documents": self.documents,
            "tokens": self.tokens,
            "job": self.job.to_json(),
            "offsets_sha256": self.offsets_sha256,
            "shards": [vars(shard) for shard in self.shards],
        }
        return (json.dumps({**body, "sha256": _digest(body)}, indent=1) + "\n").encode()

    @classmethod
    def unpack(cls, data: bytes, name: str) -> Self:
        """Parse the contents of its file.

        Args:
            data: The contents.
            name: The file's name, for messages.

        Returns:
            The manifest.

        Raises:
            DataError: If it is not a manifest, of another version, or corrupt.
        """
        try:
            body = json.loads(data)
            saved_digest = body.pop("sha256")
            version = body["version"]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(f"{name} is corrupt, or not a manifest of token shards: {error!r}") from None
        if version != VERSION:
            raise DataError(
                f"{name} has version {version}, but this titan-data reads version {VERSION}: upgrade titan-data"
            )
        if _digest(body) != saved_digest:
            raise DataError(f"{name} is corrupt: its checksum does not match")
        return cls(
            job=Job.from_json(body["job"]),
            shards=tuple(ShardEntry(**shard) for shard in body["shards"]),
            offsets_sha256=body["offsets_sha256"],
        )


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder.

    Args:
        folder: A folder of token shards.

    Returns:
        The manifest.

    Raises:
        DataError: If the folder has no manifest or is unfinished, or the manifest is corrupt.
    """
    path = folder / MANIFEST
    try:
        return Manifest.unpack(path.read_bytes(), str(path))
    except FileNotFoundError:
        if (folder / UNFINISHED).exists():
            raise DataError(f"{folder} is not finished: run the same `titan-data prepare` command again") from None
        parts = f"; join its parts with `titan-data merge {folder}`" if any(folder.glob("part-*-of-*")) else ""
        raise DataError(f"{folder} contains no token shards: it has no {MANIFEST}{parts}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
