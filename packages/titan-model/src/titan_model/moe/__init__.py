"""Mixtures of experts: router, experts, the layer that joins them, and load balancing.

Called by `decoder`, which puts the layer where a dense model has its feed-forward.
Hands on the block's output; the training loop reads expert loads and the balancing loss through `load_balancing`.
"""
