"""From text to token batches, in one order on any number of ranks."""

from titan_data.batch import Batch
from titan_data.download_tokenizer import download_tokenizer
from titan_data.errors import ChangedDataError, DataError
from titan_data.files import load_files
from titan_data.fingerprint import Fingerprint
from titan_data.huggingface import load_huggingface
from titan_data.load_tokenizer import load_tokenizer
from titan_data.loader import Loader
from titan_data.mixing import Stage, Weighted
from titan_data.packing import Packing
from titan_data.permutation import Permutation
from titan_data.retry import Retry
from titan_data.sentencepiece_model import SentencePieceTokenizer
from titan_data.shards.megatron import MegatronTokens
from titan_data.shards.prepare import prepare
from titan_data.shards.raw import RawTokens
from titan_data.shards.reader import TokenShards
from titan_data.shards.verify import verify
from titan_data.sources import IterableSource, ListSource, RandomAccessSource, Source, StreamSource, TokenSource
from titan_data.stdlib import StdlibSource
from titan_data.tiktoken_bpe import TiktokenTokenizer
from titan_data.tokenizer import ByteTokenizer, Tokenizer
from titan_data.tokenizer_json import HuggingFaceTokenizer
from titan_data.train_tokenizer import train_tokenizer

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
