"""The little of protocol buffers that a SentencePiece model needs: which fields it has, and changing a piece's type.

Source of the numbers: sentencepiece_model.proto (ModelProto.pieces is 1; SentencePiece.type is 3, CONTROL 3,
USER_DEFINED 4).
"""

from collections.abc import Collection, Iterator

_PIECES, _DELIMITED = 1, 2
_TYPE_USER_DEFINED = bytes([3 << 3 | 0, 4])
_TYPE_CONTROL = bytes([3 << 3 | 0, 3])  # a varint field; the last of several counts


def top_level_fields(data: bytes) -> set[int]:
    """List the field numbers of a message; of a corrupt one, those before the error."""
    return {field for field, _, _ in _fields(data)}


def user_defined_pieces(data: bytes) -> set[int]:
    """List the numbers of the pieces that are found in any text, whatever the model would split it into."""
    pieces = ((begin, end) for field, begin, end in _fields(data) if field == _PIECES)
    # Fields are written in the order of their numbers, so the type is the last.
    return {i for i, (_, end) in enumerate(pieces) if data[end - 2 : end] == _TYPE_USER_DEFINED}


def as_control_pieces(data: bytes, ids: Collection[int]) -> bytes:
    """Return a model in which some pieces are control pieces, which are never found in text.

    Args:
        data: The model.
        ids: Numbers of the pieces.
    """
    out = bytearray()
    number, at = 0, 0
    for field, begin, end in _fields(data):
        if field == _PIECES:
            if number in ids:
                piece = data[begin:end] + _TYPE_CONTROL
                out += bytes([_PIECES << 3 | _DELIMITED]) + _pack_varint(len(piece)) + piece
                at = end
            number += 1
        out += data[at:end]
        at = end
    return bytes(out + data[at:])


def _fields(data: bytes) -> Iterator[tuple[int, int, int]]:
    """List number, beginning and end of the contents of the length-delimited fields, up to any other field."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 != _DELIMITED:  # the fields of interest are length-delimited; the rest is left to the library
            break
        length, at = _varint(data, at)
        yield tag >> 3, at, at + length
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    for byte in data[at : at + 10]:
        value |= (byte & 127) << shift
        shift += 7
        at += 1
        if byte < 128:
            break
    return value, at


def _pack_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
