"""Argument types of numbers."""

import argparse


def count(text: str) -> int:
    """Parse an integer of at least 0, with or without separators (1_000, 1,000)."""
    value = int(text.replace(",", "_"))
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {value}")
    return value


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    value = count(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
