"""Where checkpoints lie: a local file system or an object store, and the lock of a folder.

Called by everything that touches a file. The writer process imports this package: keep this file free of torch.
Hands on the `Storage` protocol; a checkpoint becomes valid in `publish`, and nowhere else.
"""
