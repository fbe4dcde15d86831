"""Where checkpoints are stored (a local file system or an object store), and the lock of a checkpoint directory.

Called by everything that touches a file. Hands on the `Storage` protocol: a checkpoint becomes valid in
`Storage.publish` and nowhere else. Nothing here imports torch, so `titan-ckpt ls` and `prune` start fast.
"""
