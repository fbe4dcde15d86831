"""`train_tokenizer`: small tokenizers trained on any texts, offline and reproducibly."""

import base64
import io
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Literal

from titan_data.errors import DataError
from titan_data.tokenizers.base import replace_surrogates
from titan_data.tokenizers.byte_letters import bytes_of_letters
from titan_data.tokenizers.tiktoken_encodings import SPECIAL_TOKENS, SPLIT_PATTERN

Kind = Literal["bpe", "sentencepiece"]
_MAX_LINE = 4000  # bytes; SentencePiece's trainer skips longer lines


def train_tokenizer(texts: Iterable[str], *, kind: Kind, vocab_size: int) -> bytes:
    """Train a tokenizer; the same texts in the same order give the same bytes.

    Args:
        texts: The training texts.
        kind: "bpe" for tiktoken ranks with Llama 3's split pattern; "sentencepiece" for a byte-pair SentencePiece model
            with Llama 2's settings (no normalization, single digits, unknown characters as bytes).
        vocab_size: Number of ids, special tokens included; in "bpe", 256 are single bytes and 256 special tokens.

    Returns:
        The contents of a file for `load_tokenizer`.

    Raises:
        DataError: If `tokenizers` is not installed (for "bpe"), or there is no text, or too little for `vocab_size`.
    """
    rest = iter(texts)
    first = next((text for text in rest if text.strip()), None)
    if first is None:
        raise DataError("there is no text to train a tokenizer on: all documents are empty")
    train = _train_bpe if kind == "bpe" else _train_sentencepiece
    return train(chain([first], rest), vocab_size)


def _train_bpe(texts: Iterable[str], vocab_size: int) -> bytes:
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers  # here: an optional extra
    except ImportError:
        raise DataError("training BPE needs an extra: pip install 'titan-data[huggingface]'") from None
    count = vocab_size - SPECIAL_TOKENS
    if count < 256:
        raise DataError(
            f"a BPE vocabulary must have at least {256 + SPECIAL_TOKENS} ids "
            f"(256 bytes and {SPECIAL_TOKENS} special tokens), not {vocab_size}"
        )
    bytes_of = bytes_of_letters()
    trainer = trainers.BpeTrainer(vocab_size=count, initial_alphabet=list(bytes_of), show_progress=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.train_from_iterator((replace_surrogates(text) for text in texts), trainer)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if len(vocabulary) < count:
        raise DataError(
            f"these texts are enough for {len(vocabulary) + SPECIAL_TOKENS} ids (special tokens included), "
            f"not {vocab_size}: lower vocab_size, or use more text"
        )
    lines = []
    for rank, (letters, _) in enumerate(vocabulary):
        token = b"".join(bytes_of[letter] for letter in letters)
        lines.append(base64.b64encode(token) + b" %d\n" % rank)
    return b"".join(lines)


def _train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    import sentencepiece  # here: keeps `import titan_data` fast

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.99995,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=_MAX_LINE + 100,
            num_threads=1,  # makes the model independent of the machine
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).rpartition("] ")[2] or error  # drops the source line of the library
        raise DataError(f"SentencePiece cannot train {vocab_size} ids on these texts: {reason}") from None
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Split texts into lines, and long lines into parts: the trainer skips long lines and knows newlines as a byte."""
    for text in texts:
        for line in replace_surrogates(text).split("\n"):
            while len(line) > _MAX_LINE // 4:  # a character has up to four bytes
                yield line[: _MAX_LINE // 4]
                line = line[_MAX_LINE // 4 :]
            if line:
                yield line
