"""The checkpoint format: manifest, index, safetensors headers, checksums. See docs/checkpoint-format.md.

Called by `save` (to write), `load` and `manage` (to read and verify).
Hands on typed records (`Manifest`, `TensorSpec`, `Chunk`) that were checked against one another.
"""
