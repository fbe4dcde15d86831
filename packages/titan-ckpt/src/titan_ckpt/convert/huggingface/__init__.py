"""Hugging Face folders of safetensors files, read and written.

Called by `convert.formats` (reading), `HuggingFaceExport` after a save, and the `convert` command.
The reader hands on a `TensorSource`; the writer publishes a whole folder or nothing.
"""
