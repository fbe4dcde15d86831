"""Text and Parquet files, local or remote, as rows that can be addressed: find, open, decompress, split, retry.

Called by users through `load_files`, and by `sources.huggingface` for datasets on the Hub.
Hands on sources of documents (random access where the format allows it, streams where not).
"""
