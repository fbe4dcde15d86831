"""Tokens on disk: `prepare` writes token shards; `TokenShards`, `RawTokens` and `MegatronTokens` memory-map tokens.

Called by users and by the command line. See docs/token-shards.md for the format.
Hands on token sources, whose documents the loader packs without tokenizing again.
"""
