"""From a directory's path or URL to its storage."""

from titan_ckpt.messages import local_path
from titan_ckpt.storage.base import Storage
from titan_ckpt.storage.local import LocalStorage


def open_storage(directory: str) -> Storage:
    """Return the storage of a directory.

    Args:
        directory: A path, or an fsspec URL such as `s3://bucket/run`.

    Returns:
        The storage; nothing is created.

    Raises:
        CheckpointError: If the URL's scheme is unknown, or its implementation is not installed.
    """
    if "://" in directory and not directory.startswith("file://"):
        from titan_ckpt.storage.object_store import ObjectStorage  # imports fsspec only where it is used

        return ObjectStorage(directory)
    return LocalStorage(directory.removeprefix("file://"))


def parent_and_name(path: str) -> tuple[str, str]:
    """Split a checkpoint's path or URL into its parent directory and its name."""
    if "://" not in path:
        path = str(local_path(path))
    parent, slash, name = path.rstrip("/").rpartition("/")
    if not slash:
        return ".", name
    return (parent + "/" if parent.endswith(":/") else parent or "/"), name
