"""ByteTokenizer: round trips, specials, and text that UTF-8 cannot express."""

from hypothesis import given
from hypothesis import strategies as st

from titan_data import ByteTokenizer


@given(st.text())
def test_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text


def test_specials_are_in_the_vocabulary_and_give_no_text() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (256, 257, 258)
    assert tokenizer.decode([256, 104, 105, 257, 300, -1]) == "hi"


def test_lone_surrogates_and_broken_bytes_do_not_crash() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a?b?"
    assert tokenizer.decode([104, 0xFF, 105]) == "h\ufffdi"
