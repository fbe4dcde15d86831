"""Numbers on the command line."""

import argparse


def count(text: str) -> int:
    """Read a whole number of at least 0, with or without separators (1_000, 1,000)."""
    value = int(text.replace(",", "_"))
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    value = count(text)
    if value == 0:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return value
