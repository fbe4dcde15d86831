"""Weights and configs from and to Hugging Face folders and Meta checkpoints.

Called by users (`load_huggingface`, `save_huggingface`, `load_meta`), and by titan-ckpt through a `WeightMap`.
Hands on models with loaded weights, and maps that say how each family's names and shapes correspond.
"""
