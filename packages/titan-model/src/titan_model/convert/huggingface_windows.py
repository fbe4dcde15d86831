"""The sliding windows of a `config.json`: which layers have one, by each of the ways in which families say it.

Called by `huggingface_config`; `huggingface_keys` reports the errors that are found here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from titan_model.config import DecoderConfig
from titan_model.convert.errors import shown
from titan_model.convert.huggingface_families import FAMILIES

_FULL, _SLIDING = "full_attention", "sliding_attention"


class Windows(NamedTuple):
    """The windows of a model, as `DecoderConfig` has them.

    Attributes:
        window: Number of keys that a query attends to, or None for all.
        full_layers: Indices of the blocks that attend to the full sequence even so.
    """

    window: int | None = None
    full_layers: tuple[int, ...] = ()


def read_windows(values: Mapping[str, Any], kind: str) -> Windows:
    """Return the windows of a `config.json`, after `window_errors` found no error."""
    window, n_layers = _width(values, kind), values["num_hidden_layers"]
    if window is None or window >= values["max_position_embeddings"]:
        return Windows()
    types = values.get("layer_types")
    if FAMILIES[kind].windows == "by layer" and types is not None:
        full = [layer for layer, one in enumerate(types) if one == _FULL]
    elif FAMILIES[kind].windows == "by layer":
        full = _full_by_default(values, kind)
    else:
        full = []
    return Windows() if len(full) == n_layers else Windows(window, tuple(full))


def window_errors(given: Mapping[str, Any], kind: str) -> list[str]:
    """Return the errors of settings that let a layer attend to less than the full sequence.

    Args:
        given: The contents of a `config.json`, of the right types, without those that are null.
        kind: Its `model_type`, a key of `FAMILIES`.
    """
    layers, by_layer, wrong = given.get("num_hidden_layers", 0), FAMILIES[kind].windows, []
    window = given.get("sliding_window")
    if by_layer == "none" and window is not None and window < given.get("max_position_embeddings", 0):
        wrong.append(f"sliding_window is {window}, a {kind} attends to the full sequence")
    types = given.get("layer_types")
    if types is None:
        return wrong
    if other := sorted(set(types) - {_FULL, _SLIDING}):
        wrong.append(
            f"layer_types has {', '.join(map(shown, other))}, a Decoder supports {_FULL!r} and {_SLIDING!r} only"
        )
    if len(types) != layers:
        wrong.append(f"layer_types has {len(types)} entries, but num_hidden_layers is {layers}")
    width = _width(given, kind) if by_layer != "none" else None
    if _SLIDING in types and width is None:
        wrong.append(f"layer_types has {_SLIDING!r}, but no sliding_window is used")
    if _FULL in types and width is not None and by_layer == "all":
        wrong.append(f"layer_types has {_FULL!r}, but in a {kind} sliding_window {width} is that of all layers")
    return wrong


def windows_to_huggingface(config: DecoderConfig, kind: str) -> dict[str, Any]:
    """Return the keys of a `config.json` that say which layers have a window."""
    family, window, full = FAMILIES[kind], config.window, config.full_layers
    if family.windows == "none":
        return {}
    values: dict[str, Any] = {"sliding_window": window}
    if not family.window_is_used:
        values["use_sliding_window"] = window is not None
    if family.windows == "by layer" and window is not None:
        values["layer_types"] = [_FULL if layer in full else _SLIDING for layer in range(config.n_layers)]
        if full == tuple(range(len(full))) and family.first_window is not None:  # for earlier releases
            values["max_window_layers"] = len(full)
    return values


def _width(values: Mapping[str, Any], kind: str) -> int | None:
    """Return the width of the windows, if any layer has one."""
    family = FAMILIES[kind]
    if family.windows == "none" or not (family.window_is_used or values.get("use_sliding_window")):
        return None
    window: int | None = values.get("sliding_window", family.window)
    return window


def _full_by_default(values: Mapping[str, Any], kind: str) -> list[int]:
    """Return the layers without a window, where no layer types say it."""
    layers, default = range(values["num_hidden_layers"]), FAMILIES[kind].first_window
    if default is None:  # SmolLM3: those with rotary positions
        without_rope = nope_layers(values, kind)
        return [layer for layer in layers if layer not in without_rope]
    first = values.get("max_window_layers")
    return [layer for layer in layers if layer < (default if first is None else first)]


def nope_layers(values: Mapping[str, Any], kind: str) -> tuple[int, ...]:
    """Return the layers without rotary positions."""
    if not FAMILIES[kind].no_rope_layers:
        return ()
    layers, flags = range(values["num_hidden_layers"]), values.get("no_rope_layers")
    if flags is not None:
        return tuple(layer for layer in layers if not flags[layer])
    interval = values.get("no_rope_layer_interval")
    return tuple(layer for layer in layers if (layer + 1) % (4 if interval is None else interval) == 0)
