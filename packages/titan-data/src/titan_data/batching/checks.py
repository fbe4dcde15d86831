"""What a loader cannot be made of, and what to change."""

from collections.abc import Sequence

from titan_data.errors import DataError
from titan_data.sources.base import Source, TokenSource
from titan_data.tokenizers.base import Tokenizer


def check_tokenizers(sources: Sequence[Source], tokenizer: Tokenizer | None) -> None:
    """Refuse tokens that another tokenizer made, or several of them."""
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
                "data again so that there is one tokenizer, or give the loader the one that made them"
            )


def check_sizes(global_batch_size: int, rank: int, world: int, prefetch: int, workers: int) -> None:
    """Refuse numbers that cannot be, and a global batch that does not divide among the ranks."""
    for name, value, least in (
        ("global_batch_size", global_batch_size, 1),
        ("world", world, 1),
        ("prefetch", prefetch, 0),
        ("workers", workers, 0),
    ):
        if value < least:
            raise DataError(f"{name} must be at least {least}, not {value}")
    if not 0 <= rank < world:
        raise DataError(f"rank must be in 0..{world - 1} for world = {world}, not {rank}")
    if global_batch_size % world != 0:
        below = global_batch_size // world * world
        nearby = [size for size in (below, below + world) if size > 0]
        raise DataError(
            f"global_batch_size = {global_batch_size} cannot be divided among world = {world} ranks; "
            f"use global_batch_size = {' or '.join(map(str, nearby))}"
        )
