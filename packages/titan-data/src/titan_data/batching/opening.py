"""What a loader is made of, from its arguments: sources, tokenizing, packers, the limits of ids. Called by `Loader`."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from titan_data.batching.best_fit import BestFit
from titan_data.batching.cutting import Concat, OnePerSequence
from titan_data.batching.documents import Encode, encode_documents
from titan_data.batching.feeds import Feed
from titan_data.batching.mixing import MixtureSource
from titan_data.batching.packing import Packer, Packing
from titan_data.batching.shared_tokens import SharedTokens
from titan_data.fingerprint import Fingerprint
from titan_data.sources.base import Source, TokenSource
from titan_data.tokenizers.base import Tokenizer

_log = logging.getLogger(__name__)


def list_parts(sources: Source | Sequence[MixtureSource]) -> list[MixtureSource]:
    """List the sources of a loader with their weights."""
    if isinstance(sources, Sequence) and all(isinstance(part, MixtureSource) for part in sources):
        return [part for part in sources if isinstance(part, MixtureSource)]
    return [MixtureSource(sources)]  # type: ignore[arg-type]  # MixtureSource checks that it is a source


def warn_of_copies(fingerprints: Mapping[str, Fingerprint]) -> None:
    """Warn of sources with equal contents."""
    by_digest: dict[str, str] = {}
    for name, fingerprint in fingerprints.items():
        first = by_digest.setdefault(fingerprint.digest, name)
        if first != name and fingerprint.count > 0:
            _log.warning("sources %r and %r have the same documents: each will be used twice", first, name)


def encoder(
    tokenizer: Tokenizer | None, share_directory: str | Path | None, sources: Sequence[Source]
) -> Encode | None:
    """Make the function that tokenizes texts; None without a tokenizer."""
    if tokenizer is None:
        return None
    if share_directory is None or all(isinstance(source, TokenSource) for source in sources):
        return partial(encode_documents, tokenizer)
    return SharedTokens(share_directory, tokenizer).encode


def open_packer(feed: Feed, max_epochs: int | None, packing: Packing) -> Packer:
    """Open the packer of a source."""
    crop = packing.long_documents == "crop"
    if packing.kind == "concat":
        return Concat(feed, max_epochs)
    if packing.kind == "one_per_row":
        return OnePerSequence(feed, max_epochs, crop=crop)
    return BestFit(feed, max_epochs, window=packing.packing_window, crop=crop)


def vocab_size(tokenizer: Tokenizer | None, sources: Sequence[Source]) -> int | None:
    """Return what all ids must be below: the tokenizer's number, else that which all token sources know."""
    if tokenizer is not None:
        return tokenizer.vocab_size
    known = [getattr(source, "vocab_size", None) for source in sources]
    return max((size for size in known if size is not None), default=None) if None not in known else None


def pad_id(tokenizer: Tokenizer | None) -> int:
    """Choose the padding token. Any will do, as padding is neither scored nor attended to."""
    if tokenizer is None:
        return 0
    return next((i for i in (tokenizer.pad_id, tokenizer.eos_id) if i is not None), 0)
