"""Expert parallelism: each rank holds some of the experts, and rows travel to them and back.

Called by `apply` for the modules that the plan lists as experts.
Returns each token's expert output on the rank that the token came from; no token is dropped.
"""
