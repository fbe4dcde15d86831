"""Building a decoder from external tensors, rule by rule.

Shared by `huggingface_files` and `meta_llama`, which open the files and hand over a `TensorSource`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from titan_model.config import DecoderConfig
from titan_model.convert.errors import WeightsError, check_shapes
from titan_model.convert.load_changes import resize_vocabulary
from titan_model.convert.quantization import check_not_quantized
from titan_model.convert.weight_map import DecoderWeightMap
from titan_model.decoder import Decoder, build


@dataclass(frozen=True)
class TensorSource:
    """External tensors by name, wherever they are stored.

    Attributes:
        where: The folder they are stored in, for messages.
        shapes: Shape of every tensor, by name.
        dtypes: Name of the dtype of every tensor, as `bfloat16`.
        fetch: Returns one tensor.
    """

    where: str
    shapes: Mapping[str, Sequence[int]]
    dtypes: Mapping[str, str]
    fetch: Callable[[str], Tensor]


def internal_tensors(config: DecoderConfig) -> dict[str, Tensor]:
    """Return every tensor that a weight map has to cover, on the meta device, without a tied head."""
    tensors = build(config, "meta").state_dict()
    if config.tied_embeddings:
        del tensors["head.weight"]
    return tensors


def external_shapes(config: DecoderConfig, weights: DecoderWeightMap) -> dict[str, tuple[int, ...]]:
    """Return the shape of every external tensor of a map, by name."""
    internal = internal_tensors(config)
    return {
        name: tuple(tensor.shape)
        for rule in weights.rules
        for name, tensor in rule.to_external({name: internal[name] for name in rule.internal}).items()
    }


def load_mapped(
    config: DecoderConfig,
    weights: DecoderWeightMap,
    source: TensorSource,
    device: torch.device | str,
    dtype: torch.dtype | None,
    *,
    vocab_size: int | None = None,
) -> Decoder:
    """Build a decoder and fill it with external tensors.

    Fetched tensors are copied and released rule by rule, so that memory holds one model and the tensors of one rule.

    Args:
        config: The decoder's shape, with the vocabulary of the files.
        weights: Maps the external names to those of the decoder.
        source: The external tensors.
        device: Device of the parameters.
        dtype: Dtype of the parameters; None keeps that of the tensors or, if they differ, takes the smallest that holds
            all their values. (Tensors that are in no file keep theirs.)
        vocab_size: Number of token ids of the decoder, if it differs from that of the files; see `LoadChanges`.

    Raises:
        WeightsError: If tensors are missing, unexpected, quantized or of the wrong shape, or a copy of a tied weight
            differs from it.
    """
    source = _with_owners(source, weights)
    found, fetch = source.shapes, source.fetch
    ignored = [name for name in found if any(re.fullmatch(pattern, name) for pattern in weights.ignored)]
    needed = external_shapes(config, weights)
    check_not_quantized(source.dtypes, needed, source.where)
    check_shapes(found, needed, source.where, accepted=[*weights.aliases, *ignored])
    dtype = dtype or _common_dtype(source.dtypes[name] for name in needed)
    for alias, owner in weights.aliases.items():
        if alias in found and not torch.equal(fetch(alias), fetch(owner)):
            raise WeightsError(
                f"{source.where}: the config ties {alias} to {owner}, but their values in the files differ: "
                "untie them in the config, or remove the wrong tensor"
            )
    tensors: dict[str, Tensor] = {}
    for rule in weights.rules:
        made = rule.to_internal({name: fetch(name) for name in rule.external})
        for name, tensor in made.items():
            # Copy even if nothing is converted: the files are memory-mapped and may change.
            tensors[name] = tensor.to(device, dtype if rule.external else None, copy=True).contiguous()
    if vocab_size is not None and vocab_size != config.vocab_size:
        config = replace(config, vocab_size=vocab_size)
        for name in tensors.keys() & {"embed.weight", "head.weight"}:
            tensors[name] = resize_vocabulary(tensors[name], vocab_size)
    model = build(config, "meta")
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    if unexpected or missing != (["head.weight"] if config.tied_embeddings else []):
        raise WeightsError(f"the weight map does not cover the model: missing {missing}, unexpected {unexpected}")
    if config.tied_embeddings:
        model.head.weight = model.embed.weight
    _reset_buffers(model, device)
    return model


@runtime_checkable
class _Resettable(Protocol):
    """A module with buffers that are in no file."""

    def reset_buffers(self, device: torch.device | str) -> None:
        """Set them to their initial values, on a device."""
        ...


def _reset_buffers(model: Decoder, device: torch.device | str) -> None:
    """Let each module fill the buffers that no weight fills; none is left as it is, since zeros may be wrong."""
    for prefix, module in model.named_modules():
        if isinstance(module, _Resettable):
            module.reset_buffers(device)
        empty = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if empty:
            raise WeightsError(
                f"{prefix or 'the model'}: no weight fills the buffer {empty[0]!r}, and {type(module).__name__} has no "
                "method reset_buffers(device) that computes it"
            )


def _with_owners(source: TensorSource, weights: DecoderWeightMap) -> TensorSource:
    """Return a source in which a tied weight has its owner's name, where the files have only the other one."""
    names = {owner: alias for alias, owner in weights.aliases.items() if alias in source.shapes}
    names = {owner: alias for owner, alias in names.items() if owner not in source.shapes}
    if not names:
        return source
    taken = {**{name: name for name in source.shapes if name not in names.values()}, **names}
    return TensorSource(
        where=source.where,
        shapes={name: source.shapes[actual] for name, actual in taken.items()},
        dtypes={name: source.dtypes[actual] for name, actual in taken.items()},
        fetch=lambda name: source.fetch(taken[name]),
    )


def _common_dtype(names: Iterable[str]) -> torch.dtype:
    """Return the dtype in which no value of any of these dtypes is rounded."""
    dtypes: list[torch.dtype] = [getattr(torch, name) for name in sorted(set(names))]
    return functools.reduce(torch.promote_types, dtypes)
