"""The section [checkpoint]: when the run is saved, what is kept, how it is resumed."""

from __future__ import annotations

from typing import Literal

from titan_train.config.section import Count, CountOrZero, Positive, Section


class CheckpointSection(Section):
    """When and how the run is saved. The last step, and a step at which a signal stops the run, are always saved."""

    interval: CountOrZero = 500
    """Steps between checkpoints; 0 saves only at the end."""
    resume: Literal["auto", "required"] = "auto"
    """auto resumes the newest valid checkpoint in the run's folder, or starts at step 0; required refuses to start."""
    on_corruption: Literal["previous", "raise"] = "previous"
    """If the newest checkpoint is corrupt: resume the one before it, with a warning, or raise an error."""
    keep_last: Count | None = 3
    """Number of newest checkpoints to keep; "none" keeps all, or with keep_best only the best and the newest."""
    keep_every: Count | None = None
    """Also keep, forever, checkpoints of steps that are a multiple of this; "none" keeps no such ones."""
    keep_best: Count | None = None
    """Also keep this many checkpoints of lowest training loss, averaged over the steps of the last report."""
    asynchronous: bool = True
    """Write checkpoints in the background while training continues."""
    on_error: Literal["raise", "warn"] = "raise"
    """If a checkpoint cannot be written: end the run, or warn and continue."""
    save_timeout: Positive | None = None
    """Seconds that a save may take before it counts as failed; "none" for no limit."""
    huggingface: bool = False
    """Also export each checkpoint, with its tokenizer, to `huggingface` in the run's folder, for transformers."""
