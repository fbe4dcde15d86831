"""Tensor parallelism: weights cut over ranks by the style that the plan gives each module.

Called by `apply`, before activation checkpointing, compile and FSDP.
Hands on the same modules, their parameters now DTensors, with the communication each style needs in hooks.
"""
