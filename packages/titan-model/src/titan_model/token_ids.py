"""Checks of integers that come from data: token ids, labels and positions.

An embedding that is split over ranks reads zeros for an id outside the vocabulary, and a loss would score a label that
no logit belongs to: both train, on nonsense. `decoder` and `loss` therefore check what they are given, without waiting
for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_model._torch_compat import assert_async

NOT_SCORED = -100


def check_range(name: str, values: Tensor, size: int, advice: str, *, except_value: int | None = None) -> None:
    """Check that integers are in `range(size)`.

    On CUDA, and in compiled code, the check runs on the device and nothing waits for it: CUDA prints the message and
    fails in a later call. Elsewhere the error is immediate and gives the value.

    Args:
        name: What the integers are, for the message.
        values: Integers of any shape. (Of a DTensor each rank checks its shard.) Not checked on the meta device.
        size: One more than the largest valid value.
        advice: What to do, for the message.
        except_value: A value that is valid too.

    Raises:
        ValueError: If the dtype is not an integer dtype, or a value is out of range.
        RuntimeError: In compiled code, if a value is out of range.
    """
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{name}: dtype is {values.dtype}, must be an integer dtype")
    local = values.to_local() if isinstance(values, DTensor) else values
    if local.is_meta:
        return
    wrong = (local < 0) | (local >= size)
    if except_value is not None:
        wrong &= local != except_value
    valid = ~wrong.any()
    if torch.compiler.is_compiling():
        assert_async(valid, f"{name}: a value is not in 0 to {size - 1}; {advice}")
        return
    try:
        assert_async(valid, f"{name}: a value is not in 0 to {size - 1}; {advice}")
    except RuntimeError:  # on the CPU at once, and on devices without the operator
        found = local[wrong].flatten()
        if len(found):
            raise ValueError(f"{name}: {int(found[0])} is not in 0 to {size - 1}; {advice}") from None
