"""Named decoder configs: one file per family, all of it data."""

from __future__ import annotations

import difflib

from titan_model.config import DecoderConfig
from titan_model.presets.debug import DEBUG
from titan_model.presets.llama2 import LLAMA2
from titan_model.presets.llama3 import LLAMA3
from titan_model.presets.qwen3 import QWEN3

_FAMILIES = (DEBUG, LLAMA2, LLAMA3, QWEN3)


def preset_names() -> list[str]:
    """Return every preset's name, family by family."""
    return [name for family in _FAMILIES for name in family]


def preset(name: str) -> DecoderConfig:
    """Return the config that goes by `name`.

    Args:
        name: One of `preset_names()`, for example `llama3_8b`.

    Raises:
        KeyError: If there is none; the message names the nearest ones.
    """
    for family in _FAMILIES:
        if name in family:
            return family[name]
    near = difflib.get_close_matches(name, preset_names(), n=3) or preset_names()
    raise KeyError(f"no model preset is called {name!r}; did you mean {', '.join(near)}?")
