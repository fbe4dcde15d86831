"""Hugging Face directories of safetensors files, read and written.

Called by `convert.formats` (reading), `HuggingFaceExport` after a save, and the `convert` command.
The reader returns a `TensorSource`; the writer publishes a complete directory or nothing.
"""
