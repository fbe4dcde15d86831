"""Models of `transformers` train to the losses and weights of one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import parallel_transformers
from parity import assert_same_training
from ranks import Ranks
from titan_parallel import Degrees, LayoutError, ParallelOptions, check_plan, plan_from_transformers

pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=parallel_transformers.PLANS)
def plain(request: pytest.FixtureRequest) -> tuple[str, list[float], dict[str, Tensor]]:
    return request.param, *parallel_transformers.reference(parallel_transformers.build(request.param))


def same(group: Ranks, plain: tuple[str, list[float], dict[str, Tensor]], *layout: object) -> None:
    family, expected, weights = plain
    assert expected[0] - expected[-1] > 0.05  # a curve to follow
    answers = group.run(parallel_transformers.train, family, *layout)
    trained = [{"losses": losses, "weights": state} for losses, state, _ in answers]
    assert_same_training(trained, {"losses": expected, "weights": weights})
    for _, _, logits in answers:
        torch.testing.assert_close(logits, answers[0][2])
        assert logits.shape == (parallel_transformers.ROWS, parallel_transformers.SEQ, parallel_transformers.VOCAB)


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [Degrees(), Degrees(tp=2)], ids=["fsdp", "tp"])
def test_two_processes(ranks2: Ranks, plain: tuple[str, list[float], dict[str, Tensor]], degrees: Degrees) -> None:
    same(ranks2, plain, degrees, ParallelOptions())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ParallelOptions(),
        pytest.param(
            ParallelOptions(sequence_parallel=False, activation_checkpointing="selective"), marks=pytest.mark.nightly
        ),
    ],
    ids=["sp", "no-sp-sac"],
)
def test_four_processes(
    ranks4: Ranks, plain: tuple[str, list[float], dict[str, Tensor]], options: ParallelOptions
) -> None:
    same(ranks4, plain, Degrees(tp=2), options)


@pytest.mark.slow
def test_plans_of_models_that_are_split_in_other_words() -> None:
    import transformers

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.device("meta"):
        phi3 = transformers.Phi3ForCausalLM(transformers.Phi3Config(vocab_size=64, pad_token_id=0, **shape))
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(LayoutError, match=r"Phi3ForCausalLM: .* styles \['colwise_gather_output', .*tensor=False"):
        plan_from_transformers(phi3)
    plan = plan_from_transformers(phi3, tensor=False)
    roles = [plan[role] for role in ("before", "blocks", "after")]
    assert roles == [["model.embed_tokens"], ["model.layers.*"], ["model.norm", "lm_head"]]
    with pytest.raises(LayoutError, match=r"tp=2 requires plan\['tensor'\]"):
        check_plan(plan, Degrees(tp=2))
    with pytest.raises(LayoutError, match="GPT2LMHeadModel: its config has no base_model_tp_plan"):
        plan_from_transformers(gpt2, tensor=False)
