"""Named decoder configs, as data: one file per model family.

Called by users and by titan-train (`preset`).
Hands on a `DecoderConfig`; `dataclasses.replace` changes it.
"""

from __future__ import annotations

import difflib

from titan_model.config import DecoderConfig
from titan_model.presets.debug import DEBUG
from titan_model.presets.llama2 import LLAMA2
from titan_model.presets.llama3 import LLAMA3
from titan_model.presets.qwen3 import QWEN3

_FAMILIES = (DEBUG, LLAMA2, LLAMA3, QWEN3)


def preset_names() -> list[str]:
    """Return the names of all presets, grouped by family."""
    return [name for family in _FAMILIES for name in family]


def preset(name: str) -> DecoderConfig:
    """Return the config of a preset.

    Args:
        name: One of `preset_names()`, for example `llama3_8b`.

    Raises:
        KeyError: If there is no such preset; the message gives the nearest names.
    """
    for family in _FAMILIES:
        if name in family:
            return family[name]
    near = difflib.get_close_matches(name, preset_names(), n=3) or preset_names()
    raise KeyError(f"unknown model preset {name!r}; did you mean {', '.join(near)}?")
