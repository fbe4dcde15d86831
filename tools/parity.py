"""What tests of all packages compare: runs on several ranks with one process, and nested states bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch


def assert_same_training(
    results: Sequence[Mapping[str, Any]],
    expected: Mapping[str, Any],
    *,
    stages: bool = False,
    loss_tolerance: float = 1e-5,
    norm_tolerance: float = 1e-5,
    weight_tolerance: tuple[float, float] = (1e-4, 1e-4),
) -> None:
    """Assert that every rank trained as one process did.

    Of each entry that `expected` has:

    - `losses`, `norms`: each step's loss and gradient norm;
    - `more`: further metrics by step, within 1e-4 of their size;
    - `initial`: a digest of the initial weights, equal;
    - `weights`, `buffers`: the tensors at the end by name; buffers are equal.

    Args:
        results: What each rank returned.
        expected: What one process returned.
        stages: Each rank has only the weights and buffers of its pipeline stages; together they have all of them.
        loss_tolerance: Largest difference of a loss.
        norm_tolerance: Largest difference of a norm, absolute or relative.
        weight_tolerance: Largest relative and absolute difference of a weight's elements.
    """
    for result in results:
        if "initial" in expected:
            assert result["initial"] == expected["initial"]
        assert result["losses"] == pytest.approx(expected["losses"], abs=loss_tolerance)
        if "norms" in expected:
            assert result["norms"] == pytest.approx(expected["norms"], abs=norm_tolerance, rel=norm_tolerance)
        if "more" in expected:
            assert result["more"].keys() == expected["more"].keys()
            for step, metrics in expected["more"].items():
                assert result["more"][step] == pytest.approx(metrics, rel=1e-4)
    relative, absolute = weight_tolerance
    for key in [key for key in ("weights", "buffers") if key in expected]:
        names = [set(result[key]) for result in results]
        assert set().union(*names) == set(expected[key])
        assert stages or all(own == set(expected[key]) for own in names)
        for result in results:
            for name, value in result[key].items():
                if key == "weights":
                    torch.testing.assert_close(value, expected[key][name], rtol=relative, atol=absolute)
                else:
                    assert value == expected[key][name], name


def same_bits(left: Any, right: Any) -> bool:
    """Return whether two nested states are equal to the bit and to the type; an OrderedDict and a dict are one."""
    if isinstance(left, torch.Tensor):
        return (
            isinstance(right, torch.Tensor)
            and (left.dtype, left.shape) == (right.dtype, right.shape)
            and torch.equal(_bytes_of(left), _bytes_of(right))
        )
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_bits(left[key], right[key]) for key in left)
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same_bits(a, b) for a, b in zip(left, right, strict=True))
    return repr(left) == repr(right)  # distinguishes -0.0 from 0.0


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
