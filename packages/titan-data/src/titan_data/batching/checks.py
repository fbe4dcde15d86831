"""Checks of the arguments of `Loader`; each error says what to change."""

import operator
from collections.abc import Sequence

from titan_data.errors import DataError
from titan_data.sources.base import Source, TokenSource
from titan_data.tokenizers.base import Tokenizer


def check_tokenizers(sources: Sequence[Source], tokenizer: Tokenizer | None) -> None:
    """Check that all token sources were made with one tokenizer, the loader's if it has one.

    Raises:
        DataError: If a source names another tokenizer.
    """
    wanted, whose = (None, "") if tokenizer is None else (tokenizer.fingerprint, "the loader's")
    for source in sources:
        made_with = source.tokenizer_fingerprint if isinstance(source, TokenSource) else None
        if made_with is None:
            continue
        if wanted is None:
            wanted, whose = made_with, f"that of source {source.name!r}"
        if made_with != wanted:
            raise DataError(
                f"source {source.name!r} was made with tokenizer {made_with!r}, but {whose} is {wanted!r}: prepare the "
                "data again with one tokenizer, or give the loader the tokenizer that made the data"
            )


def as_int(name: str, value: int) -> int:
    """Return a setting as Python's int, so that it can be part of a state in JSON; numpy's integers are accepted.

    Raises:
        DataError: If it is not an integer.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise DataError(f"{name} must be an integer, not {value!r}") from None


def check_batch_size(global_batch_size: int, world_size: int) -> None:
    """Check that the global batch divides evenly among the ranks.

    Raises:
        DataError: If it does not; the message names the nearest sizes that do.
    """
    if global_batch_size < 1:
        raise DataError(f"global_batch_size must be at least 1, not {global_batch_size}")
    if global_batch_size % world_size != 0:
        below = global_batch_size // world_size * world_size
        nearby = [size for size in (below, below + world_size) if size > 0]
        raise DataError(
            f"global_batch_size = {global_batch_size} cannot be divided among world_size = {world_size} ranks; "
            f"use global_batch_size = {' or '.join(map(str, nearby))}"
        )
