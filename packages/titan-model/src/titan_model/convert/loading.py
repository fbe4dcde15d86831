"""Building a decoder from external tensors, rule by rule.

Shared by `huggingface_files` and `meta_llama`, which open the files and hand over a `TensorSource`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_model.config import DecoderConfig
from titan_model.convert.errors import WeightsError, check_shapes
from titan_model.convert.weight_map import DecoderWeightMap
from titan_model.decoder import Decoder, build


@dataclass(frozen=True)
class TensorSource:
    """External tensors by name, wherever they are stored.

    Attributes:
        where: The folder they are stored in, for messages.
        shapes: Shape of every tensor, by name.
        fetch: Returns one tensor.
    """

    where: str
    shapes: Mapping[str, Sequence[int]]
    fetch: Callable[[str], Tensor]


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """Parse a JSON file that contains an object.

    Args:
        path: The file.
        what: What its folder should contain, for messages.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file does not contain a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: {path.parent} does not contain {what}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: invalid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must contain a JSON object, contains a {type(values).__name__}")
    return values


def internal_tensors(config: DecoderConfig) -> dict[str, Tensor]:
    """Return every tensor that a weight map has to cover, on the meta device, without a tied head."""
    tensors = build(config).state_dict()
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
) -> Decoder:
    """Build a decoder and fill it with external tensors.

    Fetched tensors are copied and released rule by rule, so that memory holds one model and the tensors of one rule.

    Args:
        config: The decoder's shape.
        weights: Maps the external names to those of the decoder.
        source: The external tensors.
        device: Device of the parameters.
        dtype: Dtype of the parameters; None keeps that of each tensor. (Tensors that are in no file keep theirs.)

    Raises:
        WeightsError: If tensors are missing, unexpected or of the wrong shape, or a copy of a tied weight differs from
            it.
    """
    found, fetch = source.shapes, source.fetch
    ignored = [name for name in found if any(re.fullmatch(pattern, name) for pattern in weights.ignored)]
    check_shapes(found, external_shapes(config, weights), source.where, accepted=[*weights.aliases, *ignored])
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
    model = build(config)
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    assert not unexpected
    assert missing == (["head.weight"] if config.tied_embeddings else [])
    if config.tied_embeddings:
        model.head.weight = model.embed.weight
    # Non-persistent buffers (the counters of the routers) are in no state dict: they start at zero.
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.zeros_like(buffer, device=device))
    return model
