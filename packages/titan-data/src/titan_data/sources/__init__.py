"""What a loader reads documents from: the source protocols, and the sources that are not files.

Called by users, who hand sources to `Loader`; implement a protocol of `base` to bring your own.
Hands on documents (text or token ids), by index or as a resumable stream, each source with a fingerprint.
"""
