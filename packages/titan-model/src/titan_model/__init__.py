"""Decoder language models as plain PyTorch modules."""
