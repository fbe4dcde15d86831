"""The quick look at a checkpoint: are all of its files there, as long as the manifest says?"""

from concurrent.futures import ThreadPoolExecutor

from titan_ckpt.format.manifest import Manifest
from titan_ckpt.storage.base import Storage


def wrong_sizes(storage: Storage, name: str, manifest: Manifest) -> list[str]:
    """Compare the length of a checkpoint's files with the manifest.

    Args:
        storage: the folder the checkpoint lies in.
        name: its name.
        manifest: its manifest.

    Returns:
        What is wrong, one sentence per file.
    """

    def told_of(file: str) -> str | None:
        return size_problem(storage, name, manifest, file)

    with ThreadPoolExecutor(storage.parallel, thread_name_prefix="titan-ckpt-size") as pool:
        return [told for told in pool.map(told_of, manifest.files) if told is not None]


def size_problem(storage: Storage, name: str, manifest: Manifest, file: str) -> str | None:
    """Compare the length of one file with the manifest.

    Args:
        storage: the folder the checkpoint lies in.
        name: its name.
        manifest: its manifest.
        file: the file.

    Returns:
        What is wrong; None when nothing is.
    """
    try:
        size = storage.size(f"{name}/{file}")
    except (FileNotFoundError, NotADirectoryError):
        return f"{file} is missing"
    except OSError as error:
        return f"{file} does not read ({error})"
    return (
        f"{file} has {size} bytes instead of {manifest.files[file].size}" if size != manifest.files[file].size else None
    )
