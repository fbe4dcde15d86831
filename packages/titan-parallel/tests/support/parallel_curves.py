"""What a parallel run must have in common with one process."""

from __future__ import annotations

import pytest
import torch


def same(results: list[dict], expected: dict, tolerance: float = 1e-5) -> None:
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"], abs=tolerance)
        assert result["norms"] == pytest.approx(expected["norms"], abs=tolerance, rel=tolerance)
        assert result["weights"].keys() == expected["weights"].keys()
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight, rtol=1e-4, atol=1e-4)
