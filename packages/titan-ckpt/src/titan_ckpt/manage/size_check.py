"""The quick check of a checkpoint: do all of its files exist with the size that the manifest says?"""

from concurrent.futures import ThreadPoolExecutor

from titan_ckpt.format.manifest import Manifest
from titan_ckpt.storage.base import Storage


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

    with ThreadPoolExecutor(storage.parallel, thread_name_prefix="titan-ckpt-size") as pool:
        return [problem for problem in pool.map(problem_of, manifest.files) if problem is not None]


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
