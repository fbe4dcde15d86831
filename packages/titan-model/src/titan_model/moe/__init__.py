"""Mixtures of experts: router, experts, the layer that joins them, and load balancing.

Called by `decoder`, which puts the layer where a dense model has its feed-forward.
Hands on the block's output; the balancing loss and expert loads are read off by the training loop.
"""
