"""`merge_shards`: join the parts of a corpus that were prepared one by one, without copying their tokens."""

from pathlib import Path

from titan_data.errors import DataError
from titan_data.shards.begin import check_same_job, locked
from titan_data.shards.digest import check_digest
from titan_data.shards.folder import check_sizes
from titan_data.shards.format import MANIFEST, OFFSETS, Job, Manifest, ShardEntry, read_manifest
from titan_data.shards.parts import Part, parts_in
from titan_data.shards.writer import write_manifest

_SHOWN = 10


def merge_shards(path: str | Path) -> Manifest:
    """Join the parts of a corpus, so that their folder is opened as one: `TokenShards(path)`.

    The parts stay where they are, in folders of their own. The folder gets a manifest that lists the shards of all
    parts, and the offsets of all documents (8 bytes each). Joining again does the same again.

    Args:
        path: The folder of the corpus, in which `prepare(..., part=...)` made a folder for each part. The parts may
            have been made on different machines and brought together.

    Returns:
        The manifest of the corpus.

    Raises:
        DataError: If a part is missing, unfinished or damaged; the parts were made from different data; or they
            contain no documents.

    Example:
        >>> import tempfile
        >>> from titan_data import ByteTokenizer, ListSource, Part, TokenShards, prepare
        >>> path, source = tempfile.mkdtemp(), ListSource(["one", "two", "three"])
        >>> for index in range(2):
        ...     _ = prepare(source, ByteTokenizer(), path, part=Part(index, 2), workers=0)
        >>> merge_shards(path).documents
        3
        >>> bytes(TokenShards(path)[2].tolist()[1:-1])
        b'three'
    """
    folder = Path(path).expanduser()
    parts = _complete_parts(folder)
    with locked(folder):
        manifests = [read_manifest(folder / part.folder_name) for part in parts]
        job = _job_of_all(folder, parts, manifests)
        for part, manifest in zip(parts, manifests, strict=True):
            check_sizes(folder / part.folder_name, manifest)
            _check_offsets(folder / part.folder_name / OFFSETS, manifest)
        shards = [
            ShardEntry(f"{part.folder_name}/{shard.name}", shard.documents, shard.tokens, shard.sha256)
            for part, manifest in zip(parts, manifests, strict=True)
            for shard in manifest.shards
        ]
        if not shards:
            raise DataError(f"the parts in {folder} contain no documents")
        return write_manifest(folder, job, shards)


def _complete_parts(folder: Path) -> list[Part]:
    """List the parts in a folder, after checking that none is missing or unfinished."""
    parts = parts_in(folder)
    if not parts:
        raise DataError(
            f"{folder} contains no parts of a corpus: `titan-data prepare ... --out {folder} --part 0/2` makes the "
            "first of two"
        )
    if len(counts := sorted({part.count for part in parts})) > 1:
        raise DataError(
            f"{folder} contains parts of {' and of '.join(map(str, counts))}: remove those that do not belong to the "
            "corpus"
        )
    count = counts[0]
    finished = {part.index for part in parts if (folder / part.folder_name / MANIFEST).exists()}
    if missing := [index for index in range(count) if index not in finished]:
        begun = {part.index for part in parts}
        names = [f"{index}/{count}{' (begun)' if index in begun else ''}" for index in missing[:_SHOWN]]
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise DataError(
            f"{folder}: {len(missing)} of {count} parts are not finished: {', '.join(names)}{more}; run the "
            "`titan-data prepare` command of each (it continues one that was begun), then join them again"
        )
    return parts


def _job_of_all(folder: Path, parts: list[Part], manifests: list[Manifest]) -> Job:
    """Check that all parts were made from the same data, and return what that is."""
    jobs = [Job(**{**vars(manifest.job), "part": None}) for manifest in manifests]
    for part, manifest, job in zip(parts, manifests, jobs, strict=True):
        if manifest.job.part != (part.index, part.count):
            raise DataError(
                f"{folder / part.folder_name} does not contain part {part.index}/{part.count}: was it renamed?"
            )
        check_same_job(jobs[0], job, folder / part.folder_name)
    return jobs[0]


def _check_offsets(path: Path, manifest: Manifest) -> None:
    try:
        check_digest(path, 0, manifest.offsets_sha256)
    except DataError as error:
        raise DataError(f"{path}: {error}; prepare or copy the part again") from None
