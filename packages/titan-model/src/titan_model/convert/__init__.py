"""Weights and configs from and to Hugging Face folders and Meta checkpoints.

Called by users (`load_huggingface`, `save_huggingface`, `load_meta`), and by titan-ckpt through a `DecoderWeightMap`.
Hands on models with loaded weights, and maps between each format's tensor names and shapes and those of a `Decoder`.
"""
