"""From text to token batches, in one order on any number of ranks."""

from titan_data.batching.batch import Batch
from titan_data.batching.mixing import Stage, Weighted
from titan_data.batching.packing import Packing
from titan_data.batching.permutation import Permutation
from titan_data.errors import ChangedDataError, DataError
from titan_data.files.load import load_files
from titan_data.files.retry import Retry
from titan_data.fingerprint import Fingerprint
from titan_data.loader import Loader
from titan_data.shards.dataset import TokenShards
from titan_data.shards.megatron import MegatronTokens
from titan_data.shards.prepare import prepare
from titan_data.shards.raw import RawTokens
from titan_data.shards.verify import verify
from titan_data.sources.base import IterableSource, ListSource, RandomAccessSource, Source, StreamSource, TokenSource
from titan_data.sources.huggingface import load_huggingface
from titan_data.sources.stdlib import StdlibSource
from titan_data.tokenizers.base import ByteTokenizer, Tokenizer
from titan_data.tokenizers.download import download_tokenizer
from titan_data.tokenizers.huggingface import HuggingFaceTokenizer
from titan_data.tokenizers.load import load_tokenizer
from titan_data.tokenizers.sentencepiece import SentencePieceTokenizer
from titan_data.tokenizers.tiktoken import TiktokenTokenizer
from titan_data.tokenizers.train import train_tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "ChangedDataError",
    "DataError",
    "Fingerprint",
    "HuggingFaceTokenizer",
    "IterableSource",
    "ListSource",
    "Loader",
    "MegatronTokens",
    "Packing",
    "Permutation",
    "RandomAccessSource",
    "RawTokens",
    "Retry",
    "SentencePieceTokenizer",
    "Source",
    "Stage",
    "StdlibSource",
    "StreamSource",
    "TiktokenTokenizer",
    "TokenShards",
    "TokenSource",
    "Tokenizer",
    "Weighted",
    "download_tokenizer",
    "load_files",
    "load_huggingface",
    "load_tokenizer",
    "prepare",
    "train_tokenizer",
    "verify",
]
