"""The letters that stand for bytes in byte-level BPE, as of GPT-2 (Radford et al. 2019)."""


def bytes_of_letters() -> dict[str, bytes]:
    """Map the characters that represent bytes back to the bytes, in the order of the bytes.

    Printable Latin-1 characters represent themselves; U+0100, U+0101 and so on represent the other bytes in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return {chr(byte if byte in printable else next(others)): bytes([byte]) for byte in range(256)}
