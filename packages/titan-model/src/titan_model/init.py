"""Initial weights that do not depend on the parallel layout.

Element `i` of the parameter `name` is a function of (seed, name, i), drawn with `counter_rng`. Each rank fills its own
shard, whatever the sharding, and all layouts start from the same weights without a seed checkpoint. Called by the
training program (or a user) after the model has been sharded and given memory.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_model._torch_compat import local_shape_and_offset
from titan_model.config import DecoderConfig
from titan_model.counter_rng import stream_key, truncated_normal

_BOUND = 3.0  # standard deviations
_CHUNK = 1 << 20  # elements drawn at once: limits the temporary memory to tens of MiB


@torch.no_grad()
def init_parameters(named_tensors: Iterable[tuple[str, Tensor]], config: DecoderConfig, seed: int) -> None:
    """Fill parameters and buffers in place with the initial state of a `Decoder`.

    Norm weights are ones; biases and the routers' buffers are zeros. Everything else is normal with standard
    deviation `config.init_std`, truncated at three standard deviations. Projections that write to the residual stream
    (`o_proj` and every `down_proj`) are scaled by 1 / sqrt(2 * n_layers) (GPT-2, Radford et al. 2019), so that the
    stream's variance at the end does not grow with depth.

    Args:
        named_tensors: Pairs of the name in the unwrapped `Decoder` and the parameter or buffer: a tensor, or a DTensor
            of any sharding, of which only the local shard is drawn. A tied weight appears once, as `embed.weight`. Any
            subset of a `Decoder` is accepted. Buffers may be left out: `to_empty` sets them to zero.
        config: The decoder's shape.
        seed: Seed of the weights.

    Raises:
        ValueError: If a name is not one of this `Decoder`, or tied weights are no longer tied.
    """
    fills = _fills(config)
    for name, tensor in named_tensors:
        # Exact names only: a prefix that a wrapper adds would select another random stream, and so other weights in
        # other layouts.
        fill = fills.get(name)
        if fill is None:
            raise ValueError(_unknown_name(name, config, fills))
        if fill.std:
            _fill_normal(tensor, fill.std, stream_key(seed, name))
        else:
            _local(tensor).fill_(fill.mean)


class _Fill(NamedTuple):
    """Initial values of a tensor."""

    mean: float = 0.0
    std: float = 0.0


def _fills(config: DecoderConfig) -> dict[str, _Fill]:
    """Return the fill of every parameter and buffer of the decoder, by its full name."""
    normal, residual = _Fill(std=config.init_std), _Fill(std=config.init_std / math.sqrt(2 * config.n_layers))
    fills = {"embed.weight": normal} | _norm_fills("norm", config)
    if not config.tied_embeddings:
        fills["head.weight"] = normal
    for layer in range(config.n_layers):
        block = f"layers.{layer}"
        fills |= _norm_fills(f"{block}.attn_norm", config) | _norm_fills(f"{block}.ffn_norm", config)
        fills |= {f"{block}.attn.{name}_proj.weight": normal for name in "qkv"}
        if config.qkv_bias:
            fills |= {f"{block}.attn.{name}_proj.bias": _Fill() for name in "qkv"}
        fills[f"{block}.attn.o_proj.weight"] = residual
        if config.qk_norm:
            fills |= {f"{block}.attn.{name}_norm.weight": _Fill(mean=1.0) for name in "qk"}
        if config.has_experts(layer):
            fills |= _moe_fills(f"{block}.ffn", config, normal, residual)
        else:
            fills |= _feed_forward_fills(f"{block}.ffn", ".weight", normal, residual)
    return fills


def _norm_fills(prefix: str, config: DecoderConfig) -> dict[str, _Fill]:
    if config.norm == "np_layernorm":
        return {}
    bias = {f"{prefix}.bias": _Fill()} if config.norm == "layernorm" else {}
    return {f"{prefix}.weight": _Fill(mean=1.0)} | bias


def _feed_forward_fills(prefix: str, suffix: str, normal: _Fill, residual: _Fill) -> dict[str, _Fill]:
    return {
        f"{prefix}.gate_proj{suffix}": normal,
        f"{prefix}.up_proj{suffix}": normal,
        f"{prefix}.down_proj{suffix}": residual,
    }


def _moe_fills(prefix: str, config: DecoderConfig, normal: _Fill, residual: _Fill) -> dict[str, _Fill]:
    assert config.moe is not None
    fills = {f"{prefix}.router.weight": normal, f"{prefix}.router.load": _Fill()}
    if config.moe.balance_bias_rate:
        fills[f"{prefix}.router.bias"] = _Fill()
    if config.moe.shared_ffn_dim:
        fills |= _feed_forward_fills(f"{prefix}.shared", ".weight", normal, residual)
    return fills | _feed_forward_fills(f"{prefix}.experts", "", normal, residual)


def _unknown_name(name: str, config: DecoderConfig, known: Iterable[str]) -> str:
    if name == "head.weight" and config.tied_embeddings:
        return (
            "head.weight is not embed.weight, but the config ties them (Module.to_empty unties weights): "
            "set `model.head.weight = model.embed.weight` first"
        )
    near = difflib.get_close_matches(name, known, n=3)
    return (
        f"cannot initialize {name!r}: it is not a parameter or buffer of a Decoder of this config "
        f"(nearest: {', '.join(near) or 'none'})"
    )


def _fill_normal(parameter: Tensor, std: float, key: int) -> None:
    """Fill a tensor, or this rank's shard of it, chunk by chunk."""
    local = _local(parameter)
    shape, offset = tuple(local.shape), (0,) * local.dim()
    if isinstance(parameter, DTensor):
        shape, offset = local_shape_and_offset(parameter)
        if shape != tuple(local.shape):
            raise ValueError(
                f"the local shard of a DTensor is {list(local.shape)}, but its placements say {list(shape)}"
            )
    flat = local.view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        stop = min(start + _CHUNK, flat.numel())
        indices = _global_indices(torch.arange(start, stop, device=flat.device), shape, offset, parameter.shape)
        flat[start:stop] = truncated_normal(key, indices, _BOUND) * std


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()


def _global_indices(
    flat: Tensor, local_shape: tuple[int, ...], offset: tuple[int, ...], global_shape: torch.Size
) -> Tensor:
    """Convert flat indices within a shard to flat indices within the full tensor (both row-major).

    Divides an index into one coordinate per dim of the shard, and adds up offset coordinates times the strides of the
    full tensor. Dims that are not split are merged with the dim before them, because the divisions take the time.
    """
    dims: list[tuple[int, int, int]] = []  # local size, offset, full size
    for size, first, full in zip(local_shape, offset, global_shape, strict=True):
        if dims and size == full:
            dims[-1] = (dims[-1][0] * full, dims[-1][1] * full, dims[-1][2] * full)
        else:
            dims.append((size, first, full))
    result, stride = torch.zeros_like(flat), 1
    for size, first, full in reversed(dims[1:]):
        result += (flat % size + first) * stride
        flat = flat // size
        stride *= full
    return result + (flat + dims[0][1]) * stride
