"""From text to token batches, in one order on any number of ranks."""

from titan_data.errors import DataError
from titan_data.huggingface import load_huggingface
from titan_data.loader import Loader
from titan_data.packing import Batch
from titan_data.permutation import Permutation
from titan_data.sources import ListSource, RandomAccessSource, Source, StreamSource
from titan_data.stdlib import StdlibSource
from titan_data.tokenizer import ByteTokenizer, Tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "DataError",
    "ListSource",
    "Loader",
    "Permutation",
    "RandomAccessSource",
    "Source",
    "StdlibSource",
    "StreamSource",
    "Tokenizer",
    "load_huggingface",
]
