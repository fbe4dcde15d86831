"""The format of token shards, version 1: what a shard's header and a folder's manifest hold (docs/token-shards.md)."""

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
HEADER_SIZE = 4096  # a page: the tokens that follow are aligned in memory
_PREFIX = struct.Struct("<8sII")  # magic, version, bytes of JSON
_DIGEST_SIZE = 32
_JSON_ROOM = HEADER_SIZE - _PREFIX.size - _DIGEST_SIZE

MANIFEST = "index.json"
OFFSETS = "document-offsets.u64"  # of all documents in the folder: where each begins, and where the last one ends
UNFINISHED = "prepare.json"  # what a folder that is being prepared will hold; gone when the manifest is there


def shard_name(number: int) -> str:
    """Name the file of shard `number`; sorted by name, shards are in order up to a million of them."""
    return f"shard-{number:06d}.tokens"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Choose the smallest of the two types that holds every id, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def offsets_start(tokens: int, dtype: np.dtype[Any]) -> int:
    """Say where in a shard the documents' offsets begin, in bytes: after the tokens, at a multiple of 8."""
    return HEADER_SIZE + -(-tokens * dtype.itemsize // 8) * 8


def shard_size(documents: int, tokens: int, dtype: np.dtype[Any]) -> int:
    """Say how large a shard's file is, in bytes."""
    return offsets_start(tokens, dtype) + 8 * (documents + 1)


@dataclass(frozen=True)
class Header:
    """What a shard says of itself.

    Attributes:
        vocab_size: every id is below it; decides the type of the tokens.
        tokenizer: fingerprint of the tokenizer that made the tokens.
        first_document: number of its first document, among all of the folder.
        documents: how many it has.
        tokens: how many it has.
        source_end: `(shard, document)` of the text source: where the next shard begins.
        sha256: of everything after the header.
    """

    vocab_size: int
    tokenizer: str
    first_document: int
    documents: int
    tokens: int
    source_end: tuple[int, int]
    sha256: str

    def pack(self) -> bytes:
        """Write it as the first `HEADER_SIZE` bytes of the file."""
        text = json.dumps(asdict(self), sort_keys=True).encode()
        if len(text) > _JSON_ROOM:
            raise DataError(
                f"a shard's header has no room for a tokenizer fingerprint of {len(self.tokenizer)} letters"
            )
        page = (_PREFIX.pack(MAGIC, VERSION, len(text)) + text).ljust(HEADER_SIZE - _DIGEST_SIZE, b"\0")
        return page + hashlib.sha256(page).digest()

    @classmethod
    def unpack(cls, page: bytes, name: str) -> Self:
        """Read the first `HEADER_SIZE` bytes of a file.

        Args:
            page: these bytes.
            name: of the file, for messages.

        Returns:
            The header.

        Raises:
            DataError: it is no shard, of another version, or damaged.
        """
        if page[: len(MAGIC)] != MAGIC:
            raise DataError(f"{name} is no token shard, or its header is damaged: it does not begin with {MAGIC!r}")
        if len(page) < HEADER_SIZE:
            raise DataError(f"{name} is cut off: it has {len(page)} bytes, less than a header")
        _, version, length = _PREFIX.unpack_from(page)
        if hashlib.sha256(page[:-_DIGEST_SIZE]).digest() != page[-_DIGEST_SIZE:]:
            raise DataError(f"the header of {name} is damaged: its checksum is wrong")
        if version != VERSION:
            raise DataError(f"{name} is of version {version}, but this titan-data reads version {VERSION}: upgrade it")
        fields = json.loads(page[_PREFIX.size : _PREFIX.size + length])
        return cls(**{**fields, "source_end": tuple(fields["source_end"])})


@dataclass(frozen=True)
class Job:
    """All that the contents of a folder depend on; one that differs is not gone on with.

    Attributes:
        source: fingerprint of the text source.
        tokenizer: fingerprint of the tokenizer.
        vocab_size: of the tokenizer.
        bos_id: the first token of each document, if any.
        eos_id: the last token of each document, if any.
        pad_id: what fills rows up, if any; never in a shard.
        shard_tokens: the most tokens of a shard, unless one document has more.
    """

    source: Fingerprint
    tokenizer: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    shard_tokens: int

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return {**vars(self), "source": self.source.to_json()}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave."""
        return cls(**{**saved, "source": Fingerprint.from_json(saved["source"])})


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the manifest; `sha256` is the one of its header."""

    name: str
    documents: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a finished folder holds.

    Attributes:
        job: what it was made of.
        shards: in the order of their documents.
        offsets_sha256: of the file of all documents' offsets.
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

    def pack(self) -> bytes:
        """Write it as the contents of its file."""
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
        """Read the contents of its file.

        Args:
            data: these contents.
            name: of the file, for messages.

        Returns:
            The manifest.

        Raises:
            DataError: it is of another format or version, or damaged.
        """
        try:
            body = json.loads(data)
            saved_digest = body.pop("sha256")
            version = body["version"]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(f"{name} is damaged, or no manifest of token shards: {error!r}") from None
        if version != VERSION:
            raise DataError(f"{name} is of version {version}, but this titan-data reads version {VERSION}: upgrade it")
        if _digest(body) != saved_digest:
            raise DataError(f"{name} is damaged: its checksum is wrong")
        return cls(
            job=Job.from_json(body["job"]),
            shards=tuple(ShardEntry(**shard) for shard in body["shards"]),
            offsets_sha256=body["offsets_sha256"],
        )


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder.

    Args:
        folder: with token shards.

    Returns:
        The manifest.

    Raises:
        DataError: there is none, the folder is not finished, or the manifest is damaged.
    """
    path = folder / MANIFEST
    try:
        return Manifest.unpack(path.read_bytes(), str(path))
    except FileNotFoundError:
        if (folder / UNFINISHED).exists():
            raise DataError(f"{folder} is not finished: run the same `titan-data prepare` command again") from None
        raise DataError(f"{folder} holds no token shards: there is no {MANIFEST}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
