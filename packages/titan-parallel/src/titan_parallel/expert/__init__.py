"""Expert parallelism: whole experts on each rank, and tokens that travel to them and back.

Called by `apply` for the modules that the plan lists as experts.
Hands on each token's expert output to the rank the token came from; no token is dropped.
"""
