"""Which files a folder of token shards was made from: recorded when `prepare` begins, compared when it resumes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from titan_data.errors import DataError
from titan_data.files.inputs import inputs_of

_SHOWN = 10


@dataclass(frozen=True)
class RecordedInputs:
    """The input files as they were when the work began.

    Attributes:
        versions: Size, and time of modification or ETag, of each file by name.
        checksums: Their SHA-256 by name; empty unless they were asked for.
    """

    versions: Mapping[str, str]
    checksums: Mapping[str, str]

    @classmethod
    def of(cls, source: object, *, checksum: bool) -> Self | None:
        """Record the files of a source; None if it reads none."""
        if (inputs := inputs_of(source)) is None:
            return None
        versions = inputs.versions()
        return cls(versions, inputs.checksums([*versions]) if checksum else {})

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {"versions": dict(self.versions), "checksums": dict(self.checksums)}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """Create a record from what `to_json` returned."""
        return cls(dict(saved["versions"]), dict(saved["checksums"]))

    def check(self, source: object, folder: Path, *, checksum: bool) -> None:
        """Check that the files of a source are those recorded.

        Args:
            source: The source.
            folder: The folder that was made from it, for messages.
            checksum: Compare the checksums of all files, not only of those with other versions.

        Raises:
            DataError: If a file has another version, and another checksum or none was recorded.
        """
        if (inputs := inputs_of(source)) is None:
            return
        now = inputs.versions()
        edited = [name for name, version in self.versions.items() if now.get(name, version) != version]
        found = inputs.checksums([name for name in self.checksums if checksum or name in edited])
        edited = [name for name in edited if name not in found]
        edited += [name for name, digest in found.items() if digest != self.checksums[name]]
        if edited:
            lines = [f"{name}: was {self.versions[name]}, now {now[name]}" for name in edited[:_SHOWN]]
            more = [f"and {len(edited) - _SHOWN} more"] if len(edited) > _SHOWN else []
            raise DataError(
                "\n  ".join([f"{folder} was prepared from files that have been edited since:", *lines, *more])
                + "\nChoose another folder, or restore the files with their times of modification. (Files that were "
                "only copied are recognized if the folder was begun with checksums.)"
            )


def check_unchanged(source: object) -> None:
    """Check that no file was edited while it was read.

    Raises:
        DataError: If one has another version than when the source was opened.
    """
    if (inputs := inputs_of(source)) is None:
        return
    before, now = inputs.versions(), inputs.current_versions()
    if edited := [name for name in before if before[name] != now[name]]:
        raise DataError(
            f"{', '.join(edited[:_SHOWN])}: edited while it was being prepared, so that what was written may be of old "
            "and new text: prepare the files again into another folder"
        )
