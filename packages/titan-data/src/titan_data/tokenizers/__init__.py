"""Text to token ids: byte, tiktoken, SentencePiece and Hugging Face tokenizers, their loading and training.

Called by users (`load_tokenizer`, `train_tokenizer`), by the loader and by `prepare`.
Hands on the `Tokenizer` protocol of `base`: ids, vocabulary size, bos and eos.
"""
