"""Models of `transformers` in pipelines train to the losses and weights of one process."""

from __future__ import annotations

import pytest
import torch

import parallel_pipeline_transformers as cases
import parallel_transformers
from ranks import Ranks
from titan_parallel import Degrees

pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name == "Llama" else [pytest.mark.nightly]) for name in cases.PLANS]
)
def test_families(ranks2: Ranks, ranks4: Ranks, family: str) -> None:
    plain = cases.build(family)
    expected, weights = parallel_transformers.reference(plain)
    logits = plain(parallel_transformers.batch(0)[0]).logits.detach()
    assert expected[0] - expected[-1] > 0.05  # a curve to follow
    for group, schedule in ((ranks2, "ZBVZeroBubble"), (ranks4, "1F1B"), (ranks4, "InterleavedZeroBubble")):
        seen: dict[str, torch.Tensor] = {}
        for losses, trained, predicted in group.run(cases.train, family, Degrees(pp=2), schedule):
            assert losses == pytest.approx(expected, abs=1e-5)
            torch.testing.assert_close(predicted, logits, rtol=1e-3, atol=1e-3)
            seen |= trained
        assert seen.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(seen[name], weight, rtol=1e-4, atol=1e-4)
