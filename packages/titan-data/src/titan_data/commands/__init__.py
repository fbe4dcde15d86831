"""The commands of `titan-data`: each module has `add_parser` and a `run` that imports what is heavy."""
