"""`load_tokenizer`: a tokenizer from a file or folder, its kind recognized by its contents."""

import json
import logging
import re
from pathlib import Path

from titan_data.errors import DataError
from titan_data.tokenizers.base import ByteTokenizer, Tokenizer
from titan_data.tokenizers.huggingface import HuggingFaceTokenizer
from titan_data.tokenizers.markers import AUTO, Markers
from titan_data.tokenizers.sentencepiece import SentencePieceTokenizer
from titan_data.tokenizers.tiktoken import TiktokenTokenizer, parse_ranks
from titan_data.tokenizers.tiktoken_encodings import ENCODINGS, find_encoding

# In a folder with both, the first is loaded, as `transformers` does.
_NAMES = ("tokenizer.json", "tokenizer.model")
# Files of tokenizers in folders that have no tokenizer.json; all but those in _NAMES have to be converted.
_OTHER_FILES = ("vocab.json", "merges.txt", "vocab.txt", "tekken.json", "spiece.model", "sentencepiece.bpe.model")
_PUBLISHED = 50_000  # ranks of a file that nobody has trained just now
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\s")

_log = logging.getLogger(__name__)


def load_tokenizer(
    path: str | Path,
    *,
    bos: str | None = AUTO,
    eos: str | None = AUTO,
    match_added_tokens: bool = False,
    encoding: str | None = None,
) -> Tokenizer:
    """Load a tokenizer.

    A text never becomes bos, eos, pad or another special token, whatever names it contains.

    Args:
        path: "bytes"; a file (tiktoken ranks, a SentencePiece model, or a Hugging Face tokenizer.json, with the
            tokenizer_config.json beside it); or a folder with a tokenizer.json or a tokenizer.model.
        bos: Name of the token before each document, such as "<s>"; None for no token. "auto": the one that the files
            name, unless they say `add_bos_token: false`, or it is the eos too, as in GPT-2.
        eos: Name of the token after each document; None for no token. "auto": the one that the files name.
        match_added_tokens: Whether added tokens that are not special ("<think>") are found in text, as `transformers`
            does. Otherwise only those of whitespace are.
        encoding: Which split pattern and special tokens belong to a file of tiktoken ranks: "gpt2", "cl100k_base",
            "o200k_base", "llama3" or "qwen". None: the published files of these are recognized, and small ones are
            taken for those of `train_tokenizer`. For others there is `TiktokenTokenizer(encoding=…)`.

    Returns:
        The tokenizer.

    Raises:
        DataError: If the file does not exist, is not a tokenizer, is corrupt, or needs an extra; a folder has several
            tokenizers; there is no token of a name; or no eos is known, so that documents would have no end.

    Example:
        >>> tokenizer = load_tokenizer("bytes")
        >>> tokenizer.encode("hi"), tokenizer.vocab_size, tokenizer.eos_id
        ([104, 105], 258, 257)
    """
    markers = Markers(bos, eos, match_added_tokens)
    if path == "bytes":
        return _bytes(markers)
    file = _find(Path(path).expanduser())
    tokenizer = _open(file, markers, encoding)
    if tokenizer.eos_id is None and eos == AUTO:
        raise DataError(
            f"{file} names no token for the end of documents, which would then run into one another: choose one with "
            'eos, such as eos = "</s>"; with None, documents have no end'
        )
    return tokenizer


def _bytes(markers: Markers) -> ByteTokenizer:
    for kind, chosen in (("bos", markers.bos), ("eos", markers.eos)):
        if chosen not in (None, AUTO):
            raise DataError(f"{kind} = {chosen!r}: the tokenizer of bytes has its own {kind}; use None or {AUTO!r}")
    if (markers.bos, markers.eos) == (AUTO, AUTO):
        return ByteTokenizer()
    return ByteTokenizer(bos=markers.bos is not None, eos=markers.eos is not None)


def _open(file: Path, markers: Markers, encoding: str | None) -> Tokenizer:
    beside = file.with_name("tokenizer_config.json")
    try:
        data = file.read_bytes()
        config = beside.read_bytes() if beside.is_file() else None
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from None
    if data.lstrip()[:1] == b"{" and encoding is None:
        return HuggingFaceTokenizer(data, config, str(file), markers)
    if _RANK_LINE.match(data):
        return _open_ranks(file, data, config, markers, encoding)
    if encoding is not None:
        raise DataError(f"{file} is not a file of tiktoken ranks: encoding = {encoding!r} has no effect; leave it out")
    if data[:1] == b"\n":  # field 1 of a protocol-buffers message
        tokenizer = SentencePieceTokenizer(data, str(file), config, markers)
        _check_added_tokens(file, tokenizer.vocab_size)
        return tokenizer
    raise DataError(f"{file} is not a tokenizer: {_what_it_is(data)}")


def _open_ranks(file: Path, data: bytes, config: bytes | None, markers: Markers, encoding: str | None) -> Tokenizer:
    if encoding is not None and encoding not in ENCODINGS:
        raise DataError(f"encoding must be one of {', '.join(ENCODINGS)}, not {encoding!r}")
    ranks = len(parse_ranks(data, str(file)))
    known = encoding or find_encoding(data)
    if known is None:
        if ranks >= _PUBLISHED or file.suffix == ".tiktoken":
            raise DataError(
                f"{file} is not one of the known files of tiktoken ranks, which do not say how text is split: name its "
                f"encoding ({', '.join(ENCODINGS)}), with encoding, or pass a TiktokenEncoding with pattern and "
                "special tokens to TiktokenTokenizer"
            )
        _log.info("%s: split pattern and special tokens of Llama 3, as train-tokenizer has them", file)
        known = "llama3"
    return TiktokenTokenizer(data, str(file), config, markers, ENCODINGS[known](ranks))


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(
            f"tokenizer {path} does not exist: give a file, a folder with {' or '.join(reversed(_NAMES))}, or 'bytes'; "
            "`titan-data download-tokenizer` downloads one from the Hugging Face Hub, "
            "`titan-data train-tokenizer` trains one"
        )
    others = [name for name in _OTHER_FILES if (path / name).is_file()]
    others = sorted([*others, *(file.name for file in path.glob("*.tiktoken"))])
    if (path / _NAMES[0]).is_file():
        return path / _NAMES[0]
    if (path / _NAMES[1]).is_file():
        if others:
            raise DataError(
                f"folder {path} has several tokenizers: {', '.join([_NAMES[1], *others])}; name the file to load, such "
                f"as {path / _NAMES[1]}"
            )
        return path / _NAMES[1]
    if others:
        raise DataError(
            f"folder {path} has {', '.join(others)}, but no {' and no '.join(reversed(_NAMES))}: name a file of "
            "tiktoken ranks or of SentencePiece, or convert the folder with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    inside = [sub for sub in sorted(path.iterdir()) if any((sub / name).is_file() for name in _NAMES)]
    hint = f"; did you mean {inside[0]}?" if inside else ""
    raise DataError(f"folder {path} has no {' and no '.join(reversed(_NAMES))}{hint}")


def _check_added_tokens(model: Path, vocab_size: int) -> None:
    """Refuse tokens that were added to a SentencePiece model in files beside it."""
    for name in ("added_tokens.json", "tokenizer_config.json"):
        try:
            found = json.loads(model.with_name(name).read_bytes())
            if name == "tokenizer_config.json":
                found = {token["content"]: int(i) for i, token in found.get("added_tokens_decoder", {}).items()}
            beyond = [token for token, i in found.items() if i >= vocab_size]
        except OSError:
            continue
        except (ValueError, TypeError, KeyError, AttributeError):
            raise DataError(f"{model.with_name(name)} is corrupt: download it again, or remove it") from None
        if beyond:
            raise DataError(
                f"{model.with_name(name)} adds {len(beyond)} tokens to {model.name}, such as {beyond[0]!r}: convert "
                "the folder with transformers, AutoTokenizer.from_pretrained(folder).save_pretrained(folder), which "
                "writes a tokenizer.json; or move the model to a folder of its own"
            )


def _what_it_is(data: bytes) -> str:
    if not data:
        return "it is empty; download it again"
    if data.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned"
    if data.lstrip()[:1] == b"<":
        return "it is an HTML or XML page, so a download has failed; download it again"
    return "it is neither tiktoken ranks, nor a SentencePiece model, nor a Hugging Face tokenizer.json"
