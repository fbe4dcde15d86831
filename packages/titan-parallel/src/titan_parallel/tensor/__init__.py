"""Tensor parallelism: weights are split over ranks by the style that the plan gives each module.

Called by `apply`, before activation checkpointing, compile and FSDP.
Returns the same modules: their parameters are DTensors, and hooks do the communication of each style. `styles` is the
entry; `kv_heads` covers fewer key/value heads than ranks, `moe` mixtures of experts, `local_parameters` modules that
compute with local shards.
"""
