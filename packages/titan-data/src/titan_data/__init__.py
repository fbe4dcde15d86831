"""From text to token batches, in one order on any number of ranks."""
