"""`load_tokenizer`: a tokenizer from a file or folder, its kind recognized by its contents."""

import re
from pathlib import Path

from titan_data.errors import DataError
from titan_data.tokenizers.base import ByteTokenizer, Tokenizer
from titan_data.tokenizers.huggingface import HuggingFaceTokenizer
from titan_data.tokenizers.sentencepiece import SentencePieceTokenizer
from titan_data.tokenizers.tiktoken import TiktokenTokenizer

# In a folder with several files, the first of these is loaded: the one that needs no extra comes first.
_NAMES = ("tokenizer.model", "tokenizer.json")
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\s")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: "bytes"; a file (tiktoken ranks, a SentencePiece model, or a Hugging Face tokenizer.json, with the
            tokenizer_config.json beside it); or a folder with a tokenizer.model or a tokenizer.json.

    Returns:
        The tokenizer.

    Raises:
        DataError: If the file does not exist, is not a tokenizer, is corrupt, or needs an extra.

    Example:
        >>> tokenizer = load_tokenizer("bytes")
        >>> tokenizer.encode("hi"), tokenizer.vocab_size, tokenizer.eos_id
        ([104, 105], 258, 257)
    """
    if path == "bytes":
        return ByteTokenizer()
    file = _find(Path(path).expanduser())
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None
    if data.lstrip()[:1] == b"{":
        config = file.with_name("tokenizer_config.json")
        return HuggingFaceTokenizer(data, config.read_bytes() if config.is_file() else None, str(file))
    if _RANK_LINE.match(data):
        return TiktokenTokenizer(data, str(file))
    if data[:1] == b"\n":  # field 1 of a protocol-buffers message
        return SentencePieceTokenizer(data, str(file))
    raise DataError(f"{file} is not a tokenizer: {_what_it_is(data)}")


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(
            f"tokenizer {path} does not exist: give a file, a folder with {' or '.join(_NAMES)}, or 'bytes'; "
            "`titan-data download-tokenizer` downloads one from the Hugging Face Hub, "
            "`titan-data train-tokenizer` trains one"
        )
    for name in _NAMES:
        if (path / name).is_file():
            return path / name
    inside = [sub for sub in sorted(path.iterdir()) if any((sub / name).is_file() for name in _NAMES)]
    hint = f"; did you mean {inside[0]}?" if inside else ""
    raise DataError(f"folder {path} has no {' and no '.join(_NAMES)}{hint}")


def _what_it_is(data: bytes) -> str:
    if not data:
        return "it is empty; download it again"
    if data.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned"
    if data.lstrip()[:1] == b"<":
        return "it is an HTML or XML page, so a download has failed; download it again"
    return "it is neither tiktoken ranks, nor a SentencePiece model, nor a Hugging Face tokenizer.json"
