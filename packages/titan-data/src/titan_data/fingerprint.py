"""Fingerprints: identify a source's data in a saved state, so that a resume can report what has changed since."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

MAX_ITEMS = 1000  # items listed, of a source and of all sources in a state: the saved state stays small
_SHOWN = 10  # items named for each kind of difference; the rest are counted


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a source's documents and of their order. Create one with `Fingerprint.of`.

    Attributes:
        kind: Kind of source, such as "jsonl" or "shards".
        settings: What else the documents depend on, such as the name of the text column; values are JSON scalars.
        count: Number of items.
        digest: Digest of kind, settings and all items in order: equal exactly if two fingerprints are.
        items: `(name, digest)` of every item in order; empty if there are more than `MAX_ITEMS`.
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
        """Create the fingerprint of a source.

        Args:
            kind: Kind of source.
            items: `(name, digest)` of everything that can be edited, added, removed or moved by itself (mostly files),
                in the order of the documents. Names appear in messages: use short ones that do not change when the
                corpus is moved (a path relative to its folder). The digest is any short string that changes with the
                contents: a checksum if there is one, else the size and similar; 16 characters are enough.
            settings: What else the documents depend on. Leave out where and how fast to read.

        Returns:
            The fingerprint; it keeps at most `MAX_ITEMS` items.
        """
        kept: list[tuple[str, str]] = []
        count = 0
        sorted_settings = tuple(sorted((key, _plain(value)) for key, value in (settings or {}).items()))
        sha = hashlib.sha256(json.dumps([kind, sorted_settings]).encode())
        for name, digest in items:
            count += 1
            sha.update(json.dumps([name, digest]).encode())
            if count <= MAX_ITEMS:
                kept.append((name, digest))
        return cls(kind, sorted_settings, count, sha.hexdigest()[:32], tuple(kept) if count <= MAX_ITEMS else ())

    def to_json(self, *, with_items: bool = True) -> dict[str, Any]:
        """Return the fingerprint as JSON values; without items it still tells whether anything has changed."""
        return {
            "kind": self.kind,
            "settings": dict(self.settings),
            "count": self.count,
            "digest": self.digest,
            "items": [list(item) for item in self.items] if with_items else [],
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """Create a fingerprint from what `to_json` returned."""
        return cls(
            kind=saved["kind"],
            settings=tuple(sorted(saved["settings"].items())),
            count=saved["count"],
            digest=saved["digest"],
            items=tuple((name, digest) for name, digest in saved["items"]),
        )


def _plain(value: Any) -> Any:
    """Return a number of numpy as Python's."""
    return value.item() if hasattr(value, "item") else value


def list_differences(saved: Fingerprint, now: Fingerprint) -> list[str]:
    """Describe what has changed between two fingerprints.

    Args:
        saved: Fingerprint in the saved state.
        now: Fingerprint of the source now.

    Returns:
        One line per difference, items grouped as edited, added, removed and reordered; empty if they are equal.
    """
    if saved.digest == now.digest:
        return []
    if saved.kind != now.kind:
        return [f"kind: was {saved.kind}, now {now.kind}"]
    then, today = dict(saved.settings), dict(now.settings)
    lines = [
        f"{key}: was {then.get(key)!r}, now {today.get(key)!r}"
        for key in sorted({*then, *today})
        if then.get(key) != today.get(key)
    ]
    if len(saved.items) == saved.count and len(now.items) == now.count:
        lines += _item_differences(saved.items, now.items)
    elif saved.count != now.count:
        lines.append(f"number of items: was {saved.count}, now {now.count}")
    return lines or [f"at least one of its {now.count} items has changed (too many to list)"]


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
