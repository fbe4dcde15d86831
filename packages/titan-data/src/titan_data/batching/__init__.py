"""Documents to batches, in one order on any number of ranks: shuffle, mix, tokenize, pack, cut into global batches.

Called by `Loader`, which asks for the batch of a step.
Hands on `Batch` dicts of this rank's sequences, and the state from which the next step follows.
"""
