"""`StdlibSource`: a corpus that exists on every machine, the source files of Python's standard library."""

import os
import sysconfig
from pathlib import Path

from titan_data.errors import DataError
from titan_data.files.reading import reading
from titan_data.fingerprint import Fingerprint

# Installed packages are not part of the library. Many distributions leave out some of the other folders, so that the
# corpus would differ from machine to machine; and tests are data and edge cases rather than readable code.
_EXCLUDED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "ensurepip",
        "turtledemo",
    }
)


class StdlibSource:
    """The `.py` files of the running Python's standard library, one document per file, in the order of their paths.

    About 10 MB of text without a download: for first runs, benchmarks and tests. Python versions have different files
    and therefore different fingerprints. Empty files are left out; invalid UTF-8 becomes U+FFFD.

    Args:
        name: The source's name.

    Raises:
        DataError: If this Python has no source files on disk.
    """

    def __init__(self, name: str = "stdlib") -> None:
        self.name = name
        self._root = Path(sysconfig.get_path("stdlib"))
        self._files = _list_files(self._root)
        if not self._files:
            raise DataError(
                f"the standard library of this Python has no .py files in {self._root} (it may be zipped or compiled): "
                "use another data source, such as ListSource or load_files with your own files"
            )

    def fingerprint(self) -> Fingerprint:
        """Return the paths and sizes of the files."""
        return Fingerprint.of("stdlib", ((path, str(size)) for path, size in self._files))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int, /) -> str:
        path = self._root / self._files[index][0]
        try:
            with reading(str(path)):
                return path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error

    @property
    def paths(self) -> list[str]:
        """The path of each document, relative to the library's folder, with forward slashes."""
        return [path for path, _ in self._files]


def _list_files(root: Path) -> list[tuple[str, int]]:
    """List the (relative POSIX path, size in bytes) of every document, sorted by path."""
    found = []
    for folder, subfolders, names in os.walk(root):
        # In place: os.walk only visits the folders that are left.
        subfolders[:] = [name for name in subfolders if name not in _EXCLUDED_FOLDERS]
        for name in names:
            path = Path(folder, name)
            if path.suffix == ".py" and (size := path.stat().st_size) > 0:
                found.append((path.relative_to(root).as_posix(), size))
    return sorted(found)
