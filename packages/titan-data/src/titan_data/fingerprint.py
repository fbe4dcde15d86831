"""What a source is made of, small enough to be saved: so that a resume can say what has changed since."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

MAX_ITEMS = 1000  # more than these are not listed one by one: the saved state stays small
_SHOWN = 10  # of each kind of difference; the rest are counted


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a source's documents and of their order. Make one with `Fingerprint.of`.

    Attributes:
        kind: what sort of source it is, such as "jsonl" or "shards".
        settings: what else the documents depend on, such as the name of the text's column; values are JSON scalars.
        count: number of items.
        digest: over kind, settings and all items in their order. Two fingerprints are equal exactly if these are.
        items: `(name, digest)` of every item in order; empty where there are more than `MAX_ITEMS`.
    """

    kind: str
    settings: tuple[tuple[str, str | int | float | bool | None], ...]
    count: int
    digest: str
    items: tuple[tuple[str, str], ...]

    @classmethod
    def of(
        cls,
        kind: str,
        items: Iterable[tuple[str, str]],
        settings: Mapping[str, str | int | float | bool | None] | None = None,
    ) -> Self:
        """Make the fingerprint of a source.

        Args:
            kind: what sort of source it is.
            items: `(name, digest)` of whatever can be edited, added, removed or moved by itself (files, mostly), in
                the order of the documents. Names are shown to people, so take short ones that a move of the whole
                corpus does not change (a path relative to its folder). The digest is any short string that changes
                with the contents: a checksum where it is at hand, else the size and the like; 16 characters will do.
            settings: what else the documents depend on. Leave out what only says where or how fast to read.

        Returns:
            The fingerprint; of any number of items it keeps at most `MAX_ITEMS`.
        """
        kept: list[tuple[str, str]] = []
        count = 0
        sorted_settings = tuple(sorted((settings or {}).items()))
        sha = hashlib.sha256(json.dumps([kind, sorted_settings]).encode())
        for name, digest in items:
            count += 1
            sha.update(json.dumps([name, digest]).encode())
            if count <= MAX_ITEMS:
                kept.append((name, digest))
        return cls(kind, sorted_settings, count, sha.hexdigest()[:32], tuple(kept) if count <= MAX_ITEMS else ())

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return {
            "kind": self.kind,
            "settings": dict(self.settings),
            "count": self.count,
            "digest": self.digest,
            "items": [list(item) for item in self.items],
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave."""
        return cls(
            kind=saved["kind"],
            settings=tuple(sorted(saved["settings"].items())),
            count=saved["count"],
            digest=saved["digest"],
            items=tuple((name, digest) for name, digest in saved["items"]),
        )


def list_differences(saved: Fingerprint, now: Fingerprint) -> list[str]:
    """Say what has changed between two fingerprints, for people.

    Args:
        saved: of the run that was stopped.
        now: of the source as it is.

    Returns:
        One line for each difference, the items' in groups: edited, added, removed, reordered; none if they are equal.
    """
    if saved.digest == now.digest:
        return []
    if saved.kind != now.kind:
        return [f"it was {saved.kind}, now it is {now.kind}"]
    lines = []
    then, today = dict(saved.settings), dict(now.settings)
    for key in sorted({*then, *today}):
        if then.get(key) != today.get(key):
            lines.append(f"{key}: was {then.get(key)!r}, now {today.get(key)!r}")
    if len(saved.items) == saved.count and len(now.items) == now.count:
        lines += _item_differences(saved.items, now.items)
    elif saved.count != now.count:
        lines.append(f"it had {saved.count} items, now it has {now.count}")
    return lines or [f"one or more of its {now.count} items have changed (too many to be listed)"]


def _item_differences(saved: tuple[tuple[str, str], ...], now: tuple[tuple[str, str], ...]) -> list[str]:
    then, today = dict(saved), dict(now)
    groups = {
        "edited": [name for name in today if name in then and then[name] != today[name]],
        "added": [name for name in today if name not in then],
        "removed": [name for name in then if name not in today],
    }
    common_then = [name for name in then if name in today]
    common_now = [name for name in today if name in then]
    groups["reordered"] = [name for name, before in zip(common_now, common_then, strict=True) if name != before]
    lines = []
    for what, names in groups.items():
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"{what}: {', '.join(names[:_SHOWN])}{more}")
    return lines
