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
from titan_data.shards.prepare import prepare
from titan_data.shards.raw import RawTokens
from titan_data.shards.verify import verify_shards
from titan_data.sources.base import IterableSource, ListSource, RandomAccessSource, Source, StreamSource, TokenSource
from titan_data.sources.huggingface import HubOptions, load_huggingface_dataset
from titan_data.sources.stdlib import StdlibSource
from titan_data.tokenizers.base import ByteTokenizer, Tokenizer
from titan_data.tokenizers.download import download_tokenizer
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
    "Permutation",
    "Phase",
    "RandomAccessSource",
    "RawTokens",
    "ReadAhead",
    "Retry",
    "SentencePieceTokenizer",
    "Source",
    "StdlibSource",
    "StorageOptions",
    "StreamSource",
    "TiktokenEncoding",
    "TiktokenTokenizer",
    "TokenShards",
    "TokenSource",
    "Tokenizer",
    "download_tokenizer",
    "load_files",
    "load_huggingface_dataset",
    "load_tokenizer",
    "prepare",
    "train_tokenizer",
    "verify_shards",
]
