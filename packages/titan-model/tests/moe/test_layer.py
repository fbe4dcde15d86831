"""The mixture of experts against one written out token by token, in values and gradients, however it is run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from model_experts import DIM, gradients, random_input, random_mixture, scores_of, token_by_token, with_moe
from titan_model import build
from titan_model.layers.feed_forward import FeedForward
from titan_model.moe.experts import Experts
from titan_model.moe.layer import MoE


@st.composite
def mixtures(draw: st.DrawFn) -> MoE:
    n_experts = draw(st.integers(1, 7))
    return random_mixture(
        seed=draw(st.integers(0, 5)),
        n_experts=n_experts,
        top_k=draw(st.integers(1, n_experts)),
        ffn_dim=draw(st.sampled_from([8, 24])),
        shared_ffn_dim=draw(st.sampled_from([0, 5])),
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        normalize_top_k=draw(st.booleans()),
        route_scale=draw(st.sampled_from([1.0, 2.5])),
        balance_bias_rate=draw(st.sampled_from([0.0, 0.1])),
    )


def assert_like_the_loop(module: MoE, x: Tensor) -> None:
    wanted = token_by_token(module, x)
    # Sums of terms far larger than themselves: what they may differ by goes with the largest.
    torch.testing.assert_close(module(x), wanted, rtol=1e-5, atol=1e-5 * max(1.0, float(wanted.detach().abs().max())))
    expected = gradients(lambda x: token_by_token(module, x), module, x)
    for name, gradient in gradients(module, module, x).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4, msg=lambda text: f"{name}: {text}")  # noqa: B023


@settings(deadline=None, max_examples=40)
@given(module=mixtures(), batch=st.integers(1, 3), length=st.integers(1, 6), seed=st.integers(0, 9))
def test_it_is_the_loop_over_tokens(module: MoE, batch: int, length: int, seed: int) -> None:
    assert_like_the_loop(module, random_input(batch, length, seed=seed))


def test_one_token_leaves_most_experts_idle() -> None:
    module = random_mixture(n_experts=6, top_k=1)
    assert_like_the_loop(module, random_input(1, 1))
    gradient = gradients(module, module, random_input(1, 1))["experts.gate_proj"]
    assert sum(bool(expert.any()) for expert in gradient) == 1


def test_all_tokens_to_one_expert() -> None:
    module = random_mixture(n_experts=5, top_k=1, balance_bias_rate=0.1)
    assert module.router.bias is not None
    module.router.bias.copy_(torch.tensor([0.0, 0, 0, 9, 0]))
    x = random_input(2, 7)
    assert_like_the_loop(module, x)
    assert gradients(module, module, x)["experts.up_proj"].flatten(1).any(1).tolist() == [
        False,
        False,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
@pytest.mark.parametrize("shared", [0, 8])
def test_no_tokens(shape: tuple[int, int], shared: int) -> None:
    module = random_mixture(shared_ffn_dim=shared)
    x = random_input(*shape)
    assert module(x).shape == (*shape, DIM)
    for gradient in gradients(module, module, x).values():
        assert not gradient.any()
    assert not module.router.load.any()


def test_it_is_qwen3s_block_of_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    for normalize in (True, False):
        module = random_mixture(n_experts=8, top_k=3, ffn_dim=24, normalize_top_k=normalize)
        theirs = modeling.Qwen3MoeSparseMoeBlock(
            modeling.Qwen3MoeConfig(
                hidden_size=DIM,
                num_experts=8,
                num_experts_per_tok=3,
                moe_intermediate_size=24,
                norm_topk_prob=normalize,
                experts_implementation="eager",
            )
        )
        with torch.no_grad():
            theirs.gate.weight.copy_(module.router.weight)
            theirs.experts.gate_up_proj.copy_(torch.cat((module.experts.gate_proj, module.experts.up_proj), 1))
            theirs.experts.down_proj.copy_(module.experts.down_proj)
        x = random_input(3, 11)
        torch.testing.assert_close(module(x), theirs(x), rtol=0, atol=1e-5)
        ours, wanted = gradients(module, module, x), gradients(theirs, theirs, x)
        wanted["router.weight"] = wanted.pop("gate.weight")
        wanted["experts.gate_proj"], wanted["experts.up_proj"] = wanted.pop("experts.gate_up_proj").chunk(2, 1)
        assert ours.keys() == wanted.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], wanted[name], rtol=1e-5, atol=1e-5)


class CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_work_is_the_same_few_operations_for_any_number_of_experts() -> None:
    def operations(n_experts: int) -> list[str]:
        module = random_mixture(n_experts=n_experts, balance_bias_rate=0.1)
        with CountOps() as counted:
            module(random_input(2, 9)).square().sum().backward()
        return counted.ops

    assert operations(2) == operations(64)
    assert operations(4).count("aten._grouped_mm.default") == 3 * 3  # three products, forward and two ways backward


def test_bf16_is_near_fp32() -> None:
    module, x = random_mixture(n_experts=8, shared_ffn_dim=8), random_input(4, 16)
    with torch.no_grad():
        exact = module(x)
        module.to(torch.bfloat16)
        # Where the two best candidates are close, rounded weights may choose another: only the mean says something.
        error = (module(x.bfloat16()).float() - exact).square().mean().sqrt()
    assert error < 0.03 * exact.std()


def test_router_computes_in_fp32_what_bf16_hands_it() -> None:
    module, x = random_mixture(n_experts=8, top_k=3).to(torch.bfloat16), random_input(4, 16).bfloat16()
    weights, chosen = module.router(x)
    assert weights.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = module.router(x)
    module.float()
    exact, same = module.router(x.float())
    assert torch.equal(chosen, same)
    assert torch.equal(weights, exact)
    assert torch.equal(under_autocast[0], exact)


def test_autocast_reaches_the_experts() -> None:
    module, x = random_mixture(shared_ffn_dim=8), random_input(2, 8)
    exact = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
        out.float().square().sum().backward()  # gradients reach parameters in their own dtype
        counts = torch.tensor([4, 0, 5, 7])
        for rows in (random_input(16), random_input(16).bfloat16()):  # autocast leaves grouped products alone
            assert module.experts(rows, counts).dtype == torch.bfloat16
    assert out.dtype == torch.bfloat16
    assert 0 < (out - exact).abs().max() < 0.1 * exact.abs().max()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_scores_that_underflow_give_no_nan(score: str) -> None:
    module = random_mixture(score=score, balance_bias_rate=0.1)
    assert module.router.bias is not None
    with torch.no_grad():
        module.router.weight.fill_(-40.0)
        module.router.weight[0] = 40.0
        module.router.bias.copy_(torch.tensor([-9.0, 0, 0, 0]))  # the one expert with a score is not chosen
    x = torch.full((1, 2, DIM), 1.0, requires_grad=True)
    assert not scores_of(module, x)[..., 1:].any()
    for gradient in gradients(module, module, x).values():
        assert gradient.isfinite().all()


def test_experts_take_any_gradient_and_count_themselves() -> None:
    # The interface of expert parallelism: this module has some of the experts and receives rows from other ranks.
    module = random_mixture(n_experts=6)
    local = Experts(2, DIM, 8)
    with torch.no_grad():
        for mine, all_of in zip(local.parameters(), module.experts.parameters(), strict=True):
            mine.copy_(all_of[2:4])
    rows = random_input(7)
    out = local(rows, torch.tensor([4, 3]))
    torch.testing.assert_close(out, module.experts(rows, torch.tensor([0, 0, 4, 3, 0, 0])))
    out.sum().backward()  # a gradient without strides
    assert rows.grad is not None
    assert rows.grad.any(1).all()


def test_rows_may_be_exchanged_around_the_experts() -> None:
    # What expert parallelism will do, on one rank: hooks that see sorted rows and counts, and put others there.
    module, x = random_mixture(n_experts=6), random_input(2, 9)
    expected = gradients(module, module, x)
    places: dict[str, Tensor] = {}

    def swap_halves(_: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        rows, counts = args
        assert int(counts.sum()) == len(rows) == 2 * 9 * 2
        first = int(counts[:3].sum())
        places["first"] = torch.tensor(len(rows) - first)
        return torch.cat((rows[first:], rows[:first])), torch.cat((counts[3:], counts[:3]))

    def swap_back(_: nn.Module, __: object, out: Tensor) -> Tensor:
        first = int(places["first"])
        return torch.cat((out[first:], out[:first]))

    module.experts.register_forward_pre_hook(swap_halves)
    module.experts.register_forward_hook(swap_back)
    with torch.no_grad():
        for parameter in module.experts.parameters():
            parameter.copy_(torch.cat((parameter[3:], parameter[:3])))
    for name, gradient in gradients(module, module, x).items():
        wanted = expected[name]
        wanted = torch.cat((wanted[3:], wanted[:3])) if name.startswith("experts") else wanted
        torch.testing.assert_close(gradient, wanted)


def selective() -> Any:
    def policy(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        kept = op in (torch.ops.aten.mm.default, torch.ops.aten._grouped_mm.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda module: module,
    "full checkpointing": checkpoint_wrapper,
    "selective checkpointing": lambda module: checkpoint_wrapper(module, context_fn=selective),
}


def compiles_grouped_products_in_fp32() -> bool:
    """torch 2.11 knows their shapes for bf16 alone."""
    try:
        torch.nn.functional.grouped_mm(
            torch.empty(8, 8, device="meta"),
            torch.empty(2, 8, 8, device="meta"),
            offs=torch.empty(2, dtype=torch.int32, device="meta"),
        )
    except RuntimeError:
        return False
    return True


def assert_same_when_run_so(wrap: Callable[[nn.Module], nn.Module], backend: str | None) -> None:
    if backend is not None and not compiles_grouped_products_in_fp32():
        pytest.skip("this torch compiles grouped products in bf16 alone")
    torch.compiler.reset()
    options = {"n_experts": 5, "shared_ffn_dim": 8, "balance_bias_rate": 0.1, "balance_loss": 0.1}
    plain, wrapped = random_mixture(**options), random_mixture(**options)
    x = random_input(2, 9)
    run = wrap(wrapped)
    if backend is not None:
        run.compile(backend=backend, fullgraph=True)
    for module in (plain, wrapped):
        module.router.num_target_tokens = torch.tensor(3.0)
    expected, got = gradients(plain, plain, x), gradients(run, wrapped, x)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(wrapped.router.load, plain.router.load)
    assert plain.router.load[:5].sum() == 2 * 9 * 2
    with torch.no_grad():  # a forward that is not trained leaves no trace, compiled or not
        torch.testing.assert_close(run(x), plain(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(wrapped.router.load, plain.router.load)


@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.filterwarnings("ignore")
def test_checkpointing_and_compilation_change_nothing(
    wrap: Callable[[nn.Module], nn.Module], backend: str | None
) -> None:
    assert_same_when_run_so(wrap, backend)


@pytest.mark.nightly
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.filterwarnings("ignore")
def test_inductor_changes_nothing(wrap: Callable[[nn.Module], nn.Module]) -> None:
    assert_same_when_run_so(wrap, "inductor")


def test_blocks_have_experts_where_the_config_says() -> None:
    model = build(with_moe(dense_layers=(1,)), "meta")
    assert isinstance(model.layers["0"].ffn, MoE)
    assert isinstance(model.layers["1"].ffn, FeedForward)
    assert isinstance(build(with_moe(shared_ffn_dim=8), "meta").layers["1"].ffn.shared, FeedForward)
    names = {name for name, _ in model.layers["0"].ffn.named_parameters()}
    assert names == {"router.weight", "experts.gate_proj", "experts.up_proj", "experts.down_proj"}
