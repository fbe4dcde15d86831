"""Text to token ids: byte, tiktoken, SentencePiece and Hugging Face tokenizers, loading and training them.

Called by users (`load_tokenizer`, `train_tokenizer`), by the loader and by `prepare`.
Hands on tokenizers, which follow the `Tokenizer` protocol of `base`: ids, vocabulary size, bos and eos.
"""
