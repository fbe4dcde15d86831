"""From a folder's path or URL to its storage."""

from titan_ckpt.storage.base import Storage
from titan_ckpt.storage.local import LocalStorage


def open_storage(folder: str) -> Storage:
    """Return the storage of a folder.

    Args:
        folder: a path, or a URL that fsspec knows, e.g. `s3://bucket/run`.

    Returns:
        Its storage; nothing is created.
    """
    if "://" in folder and not folder.startswith("file://"):
        from titan_ckpt.storage.object_store import ObjectStorage  # fsspec, and what it brings, only where it is used

        return ObjectStorage(folder)
    return LocalStorage(folder.removeprefix("file://"))


def parent_and_name(path: str) -> tuple[str, str]:
    """Split a checkpoint's path or URL into the folder it lies in and its own name."""
    parent, slash, name = path.rstrip("/").rpartition("/")
    if not slash:
        return ".", name
    return (parent + "/" if parent.endswith(":/") else parent or "/"), name
