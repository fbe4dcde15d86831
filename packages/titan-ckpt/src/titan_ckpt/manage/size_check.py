"""The quick check of a checkpoint: do all of its files exist with the size that the manifest says?"""

from titan_ckpt.format.manifest import Manifest
from titan_ckpt.storage.base import Storage
from titan_ckpt.threads import parallel_map


def size_problems(storage: Storage, name: str, manifest: Manifest) -> list[str]:
    """Compare the sizes of a checkpoint's files with the manifest.

    Args:
        storage: The directory of checkpoints.
        name: The checkpoint's name.
        manifest: Its manifest.

    Returns:
        The problems, one sentence per file.
    """

    def problem_of(file: str) -> str | None:
        return size_problem(storage, name, manifest, file)

    found = parallel_map(problem_of, manifest.files, storage.parallel, "titan-ckpt-size")
    return [problem for problem in found if problem is not None]


def size_problem(storage: Storage, name: str, manifest: Manifest, file: str) -> str | None:
    """Compare the size of one file with the manifest.

    Args:
        storage: The directory of checkpoints.
        name: The checkpoint's name.
        manifest: Its manifest.
        file: The file.

    Returns:
        The problem, or None.
    """
    try:
        size = storage.size(f"{name}/{file}")
    except (FileNotFoundError, NotADirectoryError):
        return f"{file} is missing"
    except OSError as error:
        return f"{file} cannot be read ({error})"
    expected = manifest.files[file].size
    return f"{file} has {size} bytes instead of {expected}" if size != expected else None
