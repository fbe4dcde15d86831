"""Weights from and to other formats: Hugging Face, DCP, torch.save, Meta.

Called by users (`open_source`, `load_into`, `export`, `import_weights`) and by the `convert` command.
Readers return a `TensorSource`; writers take one, through a `WeightMap` where names or shapes differ.
"""
