"""Steps with gradients written out, against the same formulas left to autograd in double precision."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from titan_model.fused_ops import rms_norm, rotate, swiglu

Function = Callable[..., Tensor]


def rope_of(length: int, half: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(length * half).view(1, length, 1, half) * 0.7
    return angles.cos(), angles.sin()


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def plain_rotate(x: Tensor) -> Tensor:
    cos, sin = (part.to(x.dtype) for part in rope_of(x.shape[1], x.shape[3] // 2))
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


PAIRS: dict[str, tuple[Function, Function]] = {
    "norm": (lambda x, weight: rms_norm(x, weight, 1e-3), plain_norm),
    "swiglu": (swiglu, plain_swiglu),
    "rotate": (lambda x: rotate(x, rope_of(x.shape[1], x.shape[3] // 2)), plain_rotate),
}


def inputs_of(name: str, rows: int, length: int, width: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "norm": [(rows, length, width), (width,)],
        "swiglu": [(rows, length, width)] * 2,
        "rotate": [(rows, length, 2, 2 * width)],
    }[name]
    return [torch.randn(shape, generator=generator).mul(2).to(dtype).requires_grad_() for shape in shapes]


def value_and_gradients(function: Function, inputs: list[Tensor], seed: int) -> list[Tensor]:
    out = function(*inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", PAIRS)
@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 3), length=st.integers(1, 5), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_value_and_gradients(
    name: str, dtype: torch.dtype, tolerance: float, rows: int, length: int, width: int, seed: int
) -> None:
    ours, plain = PAIRS[name]
    inputs = inputs_of(name, rows, length, width, dtype, seed)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    got, expected = value_and_gradients(ours, inputs, seed), value_and_gradients(plain, doubles, seed)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == dtype
        scale = float(other.detach().abs().max()) + 1.0
        assert float((one.double() - other).detach().abs().max()) <= tolerance * scale


@pytest.mark.parametrize("name", PAIRS)
def test_inputs_are_left_alone(name: str) -> None:
    inputs = inputs_of(name, 2, 3, 4, torch.float32, 0)
    before = [x.detach().clone() for x in inputs]
    value_and_gradients(PAIRS[name][0], inputs, 1)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("name", PAIRS)
def test_under_checkpoint_and_compile(name: str) -> None:
    ours, _ = PAIRS[name]
    inputs = inputs_of(name, 2, 3, 4, torch.float32, 0)
    expected = value_and_gradients(ours, inputs, 1)
    again = value_and_gradients(lambda *xs: checkpoint(ours, *xs, use_reentrant=False), inputs, 1)
    whole = value_and_gradients(torch.compile(ours, backend="aot_eager", fullgraph=True), inputs, 1)
    for one, other, third in zip(expected, again, whole, strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(one, third)


def test_norm_hands_matrix_products_their_dtype_under_autocast() -> None:
    x, weight = inputs_of("norm", 2, 3, 4, torch.float32, 0)
    with torch.autocast("cpu", torch.bfloat16):
        out = rms_norm(x, weight, 1e-3)
    assert out.dtype == torch.bfloat16
    x_grad, weight_grad = torch.autograd.grad(out.float().sum(), (x, weight))
    assert x_grad.dtype == weight_grad.dtype == torch.float32
