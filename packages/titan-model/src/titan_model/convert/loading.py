"""A decoder out of foreign tensors, rule by rule."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_model.config import DecoderConfig
from titan_model.convert.errors import WeightsError, check_shapes
from titan_model.convert.weight_map import WeightMap
from titan_model.decoder import Decoder, build


def read_description(path: Path, what: str) -> dict[str, Any]:
    """Return what a JSON file says.

    Args:
        path: The file.
        what: What its folder should be one of, for messages.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it holds no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: {path.parent} is no folder of {what}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not an object")
    return values


def native_tensors(config: DecoderConfig) -> dict[str, Tensor]:
    """Return every tensor that a weight map has to account for, on the meta device; a tied head counts once."""
    tensors = build(config).state_dict()
    if config.tied_embeddings:
        del tensors["head.weight"]
    return tensors


def foreign_shapes(config: DecoderConfig, weights: WeightMap) -> dict[str, tuple[int, ...]]:
    """Return the shape of every foreign tensor of a map, by name."""
    native = native_tensors(config)
    return {
        name: tuple(tensor.shape)
        for rule in weights.rules
        for name, tensor in rule.to_foreign({name: native[name] for name in rule.native}).items()
    }


def load_mapped(
    config: DecoderConfig,
    weights: WeightMap,
    found: Mapping[str, Sequence[int]],
    fetch: Callable[[str], Tensor],
    where: str,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> Decoder:
    """Build a decoder and fill it with foreign tensors.

    What `fetch` returns is copied and let go rule by rule, so that memory holds one model and the tensors of one rule.

    Args:
        config: The decoder's shape.
        weights: From the foreign names to ours.
        found: Shapes of the foreign tensors by name.
        fetch: Returns one of them.
        where: What holds them, for messages.
        device: Where the parameters shall lie.
        dtype: What they shall be; None keeps each as it is found. (What no file holds has a dtype of its own.)

    Raises:
        WeightsError: If anything is missing, unexpected or misshaped, or the copy of a tied weight differs from it.
    """
    expected = foreign_shapes(config, weights)
    ignored = [name for name in found if any(re.fullmatch(pattern, name) for pattern in weights.ignored)]
    check_shapes(found, expected, where, accepted=[*weights.aliases, *ignored])
    for alias, owner in weights.aliases.items():
        if alias in found and not torch.equal(fetch(alias), fetch(owner)):
            raise WeightsError(
                f"{where} ties {alias} to {owner}, but holds a tensor of that name with other values: "
                "untie them in its config, or remove the one that is wrong"
            )
    tensors: dict[str, Tensor] = {}
    for rule in weights.rules:
        made = rule.to_native({name: fetch(name) for name in rule.foreign})
        for name, tensor in made.items():
            # A copy even where nothing has to be converted: files are mapped into memory and may change.
            tensors[name] = tensor.to(device, dtype if rule.foreign else None, copy=True).contiguous()
    model = build(config)
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    assert not unexpected
    assert missing == (["head.weight"] if config.tied_embeddings else [])
    if config.tied_embeddings:
        model.head.weight = model.embed.weight
    # Buffers that are in no state dict, what routers count in training: they start at zero.
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.zeros_like(buffer, device=device))
    return model
