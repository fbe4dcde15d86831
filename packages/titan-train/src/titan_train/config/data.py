"""The section [data]: which text, and how it becomes sequences of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from titan_train.config.section import Count, CountOrZero, NotNegative, Section
from titan_train.config.sources import SourceTable, kinds_with


class MixtureEntry(SourceTable):
    """One of [[data.sources]]: a source, and its part in the mixture."""

    name: str | None = None
    """Name in metrics and in [[data.phases]]; "none" uses the source's own."""
    weight: NotNegative = 1.0
    """Fraction of the tokens that come from this source, relative to the sum of all weights."""
    at_end: Literal["drop", "error"] = "drop"
    """After max_epochs: continue without this source, or stop the run."""


class PhaseSection(Section):
    """One of [[data.phases]]: what changes from a step on."""

    from_step: Count
    """Number of steps trained before the change."""
    weights: dict[str, NotNegative] | None = None
    """New weights by source name, 0 for sources not named; "none" keeps the weights."""
    seq_len: Count | None = None
    """New number of tokens per sequence; "none" keeps it."""


class DataSection(SourceTable):
    """Which text, and how it becomes sequences of tokens."""

    sources: list[MixtureEntry] = []
    """A mixture instead of one source: [[data.sources]] tables with a source's settings, name, weight and at_end."""
    phases: list[PhaseSection] = []
    """Changes of weights or of sequence length: [[data.phases]] tables with from_step, weights and seq_len."""
    shuffle: bool = True
    """Visit the documents of each epoch in an order drawn from the seed, if the source can be read in any order."""
    tokenizer: str = "bytes"
    """File or folder with tiktoken ranks, a SentencePiece model or a tokenizer.json; `bytes` uses UTF-8 bytes."""
    bos: str | None = "auto"
    """Name of the token before each document; "auto": what the tokenizer's files say; "none": no token."""
    eos: str | None = "auto"
    """Name of the token after each document; "auto": what the tokenizer's files say; "none": no token."""
    encoding: Literal["gpt2", "cl100k_base", "o200k_base", "llama3", "qwen"] | None = None
    """What belongs to a file of tiktoken ranks; "none" recognizes the published files."""
    match_added_tokens: bool = False
    """Find added tokens that are not special in the text, as transformers does, instead of reading them as text."""
    packing: Literal["concat", "best_fit", "one_per_row"] = "concat"
    """How documents become sequences: concatenated, each put where it fits best, or one document per sequence."""
    long_documents: Literal["split", "crop"] = "split"
    """With best_fit and one_per_row: split documents longer than a sequence, or keep only their beginning."""
    packing_window: Count = 1024
    """Number of documents that best_fit packs together, and over whose sequences it spreads them."""
    mask_documents: bool = False
    """Restrict attention to tokens of the same document."""
    prefetch: CountOrZero = 2
    """Number of batches that a thread reads ahead; 0 reads each batch when it is needed."""
    workers: CountOrZero = 0
    """Number of threads that tokenize ahead; 0 tokenizes in the reading thread."""
    share_tokenizing: bool = True
    """Tokenize each text once per machine instead of once per rank."""
    allow_changes: list[
        Literal["data", "mixture", "tokenizer", "seed", "shuffle", "seq_len", "global_batch_size", "packing"]
    ] = []
    """Differences from the resumed run to accept; any other difference is refused."""

    @model_validator(mode="before")
    @classmethod
    def _one_or_several(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("sources"):
            given = [key for key in values if kinds_with(key) and (key, values[key]) != ("source", "stdlib")]
            if given:
                keys = ", ".join(given)
                raise ValueError(f"{keys}: set this in each of [[data.sources]], or remove [[data.sources]]")
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.sources and any(phase.weights is not None for phase in self.phases):
            raise ValueError("phases: weights need several sources: write these as [[data.sources]]")
        for number, phase in enumerate(self.phases, start=1):
            if phase.weights is None and phase.seq_len is None:
                raise ValueError(f"phases, table {number}: nothing changes: set weights or seq_len")
        if self.packing == "concat" and self.long_documents == "crop":
            raise ValueError('long_documents: packing "concat" never crops; use "best_fit" or "one_per_row"')
        return self

    @model_serializer(mode="wrap")
    def _flatten(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        source: dict[str, Any] = values.pop("source")
        return values if self.sources else {**source, **values}
