"""Context parallelism for a model that computes attention in a function and is not a titan model."""

from __future__ import annotations

import pytest
import torch

import parallel_context_function as cases
import parallel_transformers
from ranks import Ranks
from titan_parallel import Degrees, ParallelOptions

pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["allgather", "ring", "ulysses"])
def test_llama(ranks2: Ranks, kind: str) -> None:
    expected, weights = parallel_transformers.reference(parallel_transformers.build("Llama"))
    # Importing transformers takes its time on a busy machine.
    answers = ranks2.run(cases.train, Degrees(cp=2), ParallelOptions(context=kind), timeout=240.0)
    for losses, trained, logits in answers:
        assert losses == pytest.approx(expected, abs=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(trained[name], weight, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits, answers[0][2])
        assert logits.shape == (parallel_transformers.ROWS, parallel_transformers.SEQ, parallel_transformers.VOCAB)
