"""The commands of `titan-ckpt`, one per file: `add` declares the arguments, `run` does the work."""
