"""From a state to files: take a snapshot, plan which rank writes what, write, publish.

Called by `Checkpointer.save` on every rank, and by the importer of external weights.
Hands on a published checkpoint, valid from the moment `storage` publishes its manifest.
"""
