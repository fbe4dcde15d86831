"""Named decoder configs, as data: one file per model family.

Called by users and by titan-train (`preset`).
Hands on a `DecoderConfig`; `dataclasses.replace` changes it.
"""

from __future__ import annotations

import difflib

from titan_model.config import DecoderConfig
from titan_model.presets.debug import DEBUG
from titan_model.presets.granite import GRANITE
from titan_model.presets.hub import HUB
from titan_model.presets.llama2 import LLAMA2
from titan_model.presets.llama3 import LLAMA3
from titan_model.presets.mistral import MISTRAL
from titan_model.presets.phi3 import PHI3
from titan_model.presets.qwen2 import QWEN2
from titan_model.presets.qwen3 import QWEN3
from titan_model.presets.smollm import SMOLLM
from titan_model.presets.yi import YI

_FAMILIES = (DEBUG, LLAMA2, LLAMA3, QWEN2, QWEN3, MISTRAL, YI, SMOLLM, GRANITE, PHI3)


def preset_names() -> list[str]:
    """Return the names of all presets, grouped by family."""
    return [name for family in _FAMILIES for name in family]


def preset(name: str) -> DecoderConfig:
    """Return the config of a preset.

    Args:
        name: One of `preset_names()`, for example `llama3_8b`, or the name of such a model on Hugging Face's Hub:
            `Qwen/Qwen3-0.6B`. (Nothing is downloaded.)

    Raises:
        KeyError: If there is no such preset; the message gives the nearest names.
    """
    own = HUB.get(name, name)
    for family in _FAMILIES:
        if own in family:
            return family[own]
    known = HUB if "/" in name else preset_names()
    near = difflib.get_close_matches(name, known, n=3) or known
    raise KeyError(f"unknown model preset {name!r}; did you mean {', '.join(near)}?")
