"""The sections [training], [optimizer] and [schedule]: how much to train, in which steps, at which learning rate."""

from __future__ import annotations

from typing import Literal

from titan_train.config.section import Count, CountOrZero, Fraction, NotNegative, Positive, Section


class TrainingSection(Section):
    """Length of the run, sizes of a step, precision."""

    steps: Count = 1000
    """Last step of the run; one step is one optimizer update."""
    seq_len: Count = 1024
    """Tokens per sequence."""
    global_batch_size: Count = 32
    """Sequences per step, over all ranks."""
    microbatch_size: Count | None = None
    """Sequences per forward pass and rank; "none" uses all of a rank's, or in a pipeline as many as keep it busy."""
    max_norm: Positive | None = 1.0
    """Global norm to which gradients are clipped; "none" turns clipping off."""
    z_loss: NotNegative = 0.0
    """Coefficient of the z-loss (squared log of the softmax's denominator), against drifting logits; 0 turns it off."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of forward and backward; weights and optimizer state are always float32."""


class OptimizerSection(Section):
    """AdamW (Loshchilov & Hutter 2019)."""

    lr: Positive = 3e-4
    """Peak learning rate."""
    beta1: Fraction = 0.9
    """Decay rate of the first moment."""
    beta2: Fraction = 0.95
    """Decay rate of the second moment."""
    eps: Positive = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of matrices; vectors such as norms are not decayed."""


class ScheduleSection(Section):
    """Learning rate over the steps: linear warm-up, plateau, decay that ends with the last step."""

    warmup_steps: CountOrZero = 0
    """Steps over which the learning rate rises from 0 to its peak."""
    decay: Literal["none", "linear", "cosine"] = "cosine"
    """Shape of the decay."""
    decay_steps: Count | None = None
    """Length of the decay in steps, up to the last one; "none" decays from the end of the warm-up."""
    min_factor: Fraction = 0.1
    """Learning rate of the last step, as a fraction of the peak."""
