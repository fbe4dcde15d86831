"""A Llama of `transformers`, which knows nothing of titan, trains to the losses of one process."""

from __future__ import annotations

import pytest
import torch

import parallel_llama
from parallel_group import Group
from titan_parallel import Degrees

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def plain() -> list[float]:
    return parallel_llama.reference()


@pytest.mark.parametrize("degrees", [Degrees(), Degrees(tp=2)], ids=["fsdp", "tp"])
def test_llama_of_transformers(two: Group, plain: list[float], degrees: Degrees) -> None:
    assert plain[0] - plain[-1] > 0.05  # a curve to follow
    answers = two.run(parallel_llama.train, degrees)
    for losses, logits in answers:
        assert losses == pytest.approx(plain, abs=1e-5)
        torch.testing.assert_close(logits, answers[0][1])
        assert logits.shape == (parallel_llama.ROWS, parallel_llama.SEQ, parallel_llama.VOCAB)
