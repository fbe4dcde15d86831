"""Text to token batches, in one order on any number of ranks.

How a document becomes part of a batch, and which sub-package does each step:

    files/       find, open, decompress, split into records: JSON lines, Parquet, text
      |
    sources/     documents by index or as a stream: files, Hugging Face datasets, lists, iterables
      |
      +---- `prepare` ----> shards/    tokens on disk: written once, memory-mapped when read
      |                       |
    tokenizers/  text to ids  |        byte, tiktoken, SentencePiece, Hugging Face
      |                       |
      +-----------------------+
      |
    batching/    shuffle, pack into sequences, mix sources, build tensors; the resumable state
      |
    loader.py    `Loader`: reads ahead, `state_dict`, `load_state_dict`
      |
    `Batch`      tokens, labels, positions, document_ids `[B, S]` of this rank

`cli/` is the command line `titan-data`; `fingerprint.py` identifies a source's data, so that a resume can report
changes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titan_data.batching.batch import Batch
    from titan_data.batching.mixing import MixtureSource, Phase
    from titan_data.batching.options import Distribution, ReadAhead
    from titan_data.batching.packing import Packing
    from titan_data.batching.permutation import Permutation
    from titan_data.errors import ChangedDataError, DataError
    from titan_data.files.load import load_files
    from titan_data.files.options import Parsing, StorageOptions
    from titan_data.files.retry import Retry
    from titan_data.fingerprint import Fingerprint
    from titan_data.loader import Loader
    from titan_data.shards.dataset import TokenShards
    from titan_data.shards.megatron import MegatronTokens
    from titan_data.shards.merge import merge_shards
    from titan_data.shards.parts import Part
    from titan_data.shards.prepare import prepare
    from titan_data.shards.raw import RawTokens
    from titan_data.shards.verify import verify_shards
    from titan_data.sources.base import (
        IterableSource,
        ListSource,
        RandomAccessSource,
        Source,
        StreamSource,
        TokenSource,
    )
    from titan_data.sources.huggingface import HubOptions, load_huggingface_dataset
    from titan_data.sources.split import Split, hold_out
    from titan_data.sources.stdlib import StdlibSource
    from titan_data.tokenizers.base import ByteTokenizer, Tokenizer
    from titan_data.tokenizers.download import download_tokenizer
    from titan_data.tokenizers.export import export_tokenizer
    from titan_data.tokenizers.huggingface import HuggingFaceTokenizer
    from titan_data.tokenizers.load import load_tokenizer
    from titan_data.tokenizers.sentencepiece import SentencePieceTokenizer
    from titan_data.tokenizers.tiktoken import TiktokenTokenizer
    from titan_data.tokenizers.tiktoken_encodings import TiktokenEncoding
    from titan_data.tokenizers.train import train_tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "ChangedDataError",
    "DataError",
    "Distribution",
    "Fingerprint",
    "HubOptions",
    "HuggingFaceTokenizer",
    "IterableSource",
    "ListSource",
    "Loader",
    "MegatronTokens",
    "MixtureSource",
    "Packing",
    "Parsing",
    "Part",
    "Permutation",
    "Phase",
    "RandomAccessSource",
    "RawTokens",
    "ReadAhead",
    "Retry",
    "SentencePieceTokenizer",
    "Source",
    "Split",
    "StdlibSource",
    "StorageOptions",
    "StreamSource",
    "TiktokenEncoding",
    "TiktokenTokenizer",
    "TokenShards",
    "TokenSource",
    "Tokenizer",
    "download_tokenizer",
    "export_tokenizer",
    "hold_out",
    "load_files",
    "load_huggingface_dataset",
    "load_tokenizer",
    "merge_shards",
    "prepare",
    "train_tokenizer",
    "verify_shards",
]

# Lazy exports: importing torch takes seconds, and the command line and `prepare` do without.
_MODULES = {
    "Batch": "titan_data.batching.batch",
    "ByteTokenizer": "titan_data.tokenizers.base",
    "ChangedDataError": "titan_data.errors",
    "DataError": "titan_data.errors",
    "Distribution": "titan_data.batching.options",
    "Fingerprint": "titan_data.fingerprint",
    "HubOptions": "titan_data.sources.huggingface",
    "HuggingFaceTokenizer": "titan_data.tokenizers.huggingface",
    "IterableSource": "titan_data.sources.base",
    "ListSource": "titan_data.sources.base",
    "Loader": "titan_data.loader",
    "MegatronTokens": "titan_data.shards.megatron",
    "MixtureSource": "titan_data.batching.mixing",
    "Packing": "titan_data.batching.packing",
    "Parsing": "titan_data.files.options",
    "Part": "titan_data.shards.parts",
    "Permutation": "titan_data.batching.permutation",
    "Phase": "titan_data.batching.mixing",
    "RandomAccessSource": "titan_data.sources.base",
    "RawTokens": "titan_data.shards.raw",
    "ReadAhead": "titan_data.batching.options",
    "Retry": "titan_data.files.retry",
    "SentencePieceTokenizer": "titan_data.tokenizers.sentencepiece",
    "Source": "titan_data.sources.base",
    "Split": "titan_data.sources.split",
    "StdlibSource": "titan_data.sources.stdlib",
    "StorageOptions": "titan_data.files.options",
    "StreamSource": "titan_data.sources.base",
    "TiktokenEncoding": "titan_data.tokenizers.tiktoken_encodings",
    "TiktokenTokenizer": "titan_data.tokenizers.tiktoken",
    "TokenShards": "titan_data.shards.dataset",
    "TokenSource": "titan_data.sources.base",
    "Tokenizer": "titan_data.tokenizers.base",
    "download_tokenizer": "titan_data.tokenizers.download",
    "export_tokenizer": "titan_data.tokenizers.export",
    "hold_out": "titan_data.sources.split",
    "load_files": "titan_data.files.load",
    "load_huggingface_dataset": "titan_data.sources.huggingface",
    "load_tokenizer": "titan_data.tokenizers.load",
    "merge_shards": "titan_data.shards.merge",
    "prepare": "titan_data.shards.prepare",
    "train_tokenizer": "titan_data.tokenizers.train",
    "verify_shards": "titan_data.shards.verify",
}

if not TYPE_CHECKING:  # otherwise type checkers would accept any name of this package

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
