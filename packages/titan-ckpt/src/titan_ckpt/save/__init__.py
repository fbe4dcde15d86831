"""From a state to files: snapshot, plan who writes what, write, publish.

Called by `Checkpointer.save` on every rank. The writer process imports this package: keep this file free of torch.
Hands on a published checkpoint, which is valid from the moment `storage` publishes its manifest.
"""
