"""Text and Parquet files, local or remote, as records: find, open, decompress, split, retry.

Called by users through `load_files`, and by `sources.huggingface` for local files of datasets.
Hands on sources of documents (random access where the format allows it, streams where not).
"""
