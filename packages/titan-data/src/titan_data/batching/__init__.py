"""Documents to batches, in one order on any number of ranks: shuffle, tokenize, pack, mix, build tensors.

Called by `Loader`, which asks for one global batch after another.
Hands on `Batch` dicts of this rank's sequences, and the state from which the next batch follows.

Words used in this folder, one for each thing:

    document      one text of a source, or its token ids `[bos] + tokens + [eos]`
    queue         a source's documents in reading order: all of epoch 0, then all of epoch 1, and so on
    cursor        a point between two documents of a queue: a few integers, the first of which is the epoch
    block         consecutive documents that are read, and tokenized, together
    sequence      S tokens of one source: one line `[S]` of the batch tensors (`PackedSequence` before it is built)
    piece         the tokens of one document that are in one sequence
    global batch  the G sequences of one step over all ranks; a rank builds only its own
    phase         the steps during which mixture weights and S stay the same
    state         what is needed to resume: of a packer (cursor, offset into a document, used sequences of a window),
                  of a source (packer state and counts), of the reader (step and the state of each source)

"Position" is only used as in `Batch`: a token's index within its document and sequence.
"""
