"""What a loader reads documents from: the source protocols, and the sources that are not files.

Called by users, who pass sources to `Loader`; implement a protocol of `base` to add your own.
Hands on documents (text or token ids), by index or as a resumable stream, each source with a fingerprint.
"""
