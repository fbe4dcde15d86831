"""Initial weights that do not depend on the layout.

Element `i` of the parameter `name` is a function of (seed, name, i), so each rank fills its own shard, whatever the
sharding, and all layouts start from the same weights without a seed checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan_model.config import DecoderConfig
from titan_model.counter_rng import stream_key, truncated_normal

_BOUND = 3.0  # standard deviations
_CHUNK = 1 << 20  # elements drawn at once: bounds the scratch memory at some tens of MiB

# Whole names: what a wrapper puts into a name would select another stream, and so other weights in other layouts.
_ONES = re.compile(r"(layers\.\d+\.(attn|ffn)_)?norm\.weight")
_NORMAL = re.compile(r"(embed|head|layers\.\d+\.(attn\.[qkv]_proj|ffn\.(gate|up)_proj))\.weight")
_RESIDUAL = re.compile(r"layers\.\d+\.(attn\.o_proj|ffn\.down_proj)\.weight")


@torch.no_grad()
def init_parameters(named_parameters: Iterable[tuple[str, Tensor]], config: DecoderConfig, seed: int) -> None:
    """Fill parameters in place with the initial weights of a `Decoder`.

    Norms are ones. Everything else is normal with `config.init_std`, cut off at three standard deviations; the two
    projections that write to the residual stream are scaled by 1 / sqrt(2 * n_layers) (GPT-2, Radford et al. 2019),
    so that the stream's variance at the end does not grow with depth.

    Args:
        named_parameters: Pairs of the parameter's name in the plain `Decoder` and the parameter, a tensor or a
            DTensor of any sharding, of which only the local shard is drawn. A tied weight appears once, as
            `embed.weight`.
        config: The decoder's shape.
        seed: Selects the weights.

    Raises:
        ValueError: If a name is not one of a `Decoder`, or tied weights have come apart.
    """
    for name, parameter in named_parameters:
        if _ONES.fullmatch(name):
            _local(parameter).fill_(1.0)
        else:
            _fill_normal(parameter, _std(name, config), stream_key(seed, name))


def _std(name: str, config: DecoderConfig) -> float:
    if name == "head.weight" and config.tied_embeddings:
        raise ValueError(
            "head.weight is a weight of its own, but the config ties it to embed.weight (Module.to_empty takes tied "
            "weights apart): set `model.head.weight = model.embed.weight` first"
        )
    if _RESIDUAL.fullmatch(name):
        return config.init_std / math.sqrt(2 * config.n_layers)
    if _NORMAL.fullmatch(name):
        return config.init_std
    raise ValueError(f"no rule to initialise a parameter named {name!r}: it is not one of a Decoder")


def _fill_normal(parameter: Tensor, std: float, key: int) -> None:
    local = _local(parameter)
    shape, offset = tuple(local.shape), (0,) * local.dim()
    if isinstance(parameter, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        assert shape == tuple(local.shape)
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
    """Translate flat indices within a shard to flat indices within the whole tensor (row-major both)."""
    result = torch.zeros_like(flat)
    stride = 1
    for size, first, whole in zip(reversed(local_shape), reversed(offset), reversed(global_shape), strict=True):
        result += (flat % size + first) * stride
        flat = flat // size
        stride *= whole
    return result
