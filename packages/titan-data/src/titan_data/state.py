"""A loader's saved state: its form, and the reasons to refuse one."""

from collections.abc import Mapping
from typing import Any, TypedDict

from titan_data.errors import DataError

STATE_VERSION = 1


class LoaderState(TypedDict):
    """Plain JSON, equal on all ranks.

    Attributes:
        version: of this form.
        step: number of global batches handed out.
        queue: `[epoch, place]` where the next document is looked for.
        lanes: for each row of the global batch `[epoch, place, offset]` of the document it is reading, or None.
        settings: everything that the order of the tokens depends on.
    """

    version: int
    step: int
    queue: list[int]
    lanes: list[list[int] | None]
    settings: dict[str, int | bool | str]


def check_state(state: Mapping[str, Any], settings: Mapping[str, int | bool | str]) -> LoaderState:
    """Make sure that a saved state is one that a loader with these settings can go on from.

    Args:
        state: what was saved.
        settings: those of the loader that is to go on.

    Returns:
        The state, known to be well-formed.

    Raises:
        DataError: another form, another setting (all of them are listed), or a damaged state.
    """
    version = state.get("version")
    if version != STATE_VERSION:
        raise DataError(f"this is loader state version {version!r}, but this titan-data reads version {STATE_VERSION}")
    saved = state.get("settings")
    if not isinstance(saved, Mapping):
        raise DataError("the loader state is damaged: it has no settings")
    differences = [
        f"  {name}: saved {saved.get(name)!r}, now {settings.get(name)!r}"
        for name in sorted({*saved, *settings})
        if saved.get(name) != settings.get(name)
    ]
    if differences:
        raise DataError(
            "the order of the data would not be that of the saved run, because these differ:\n"
            + "\n".join(differences)
            + "\nResume with the saved values, or start a new run in a new folder."
        )
    step: Any = state.get("step")
    queue: Any = state.get("queue")
    lanes: Any = state.get("lanes")
    if not (
        _is_count(step)
        and _is_counts(queue, 2)
        and isinstance(lanes, list)
        and len(lanes) == settings["global_batch_size"]
        and all(lane is None or _is_counts(lane, 3) for lane in lanes)
    ):
        raise DataError("the loader state is damaged: step, queue or lanes are not what a loader writes")
    return LoaderState(version=version, step=step, queue=queue, lanes=lanes, settings=dict(settings))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_counts(value: object, length: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == length and all(map(_is_count, value))
