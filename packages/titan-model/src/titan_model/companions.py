"""What a folder of weights holds besides them and the model's shape.

A `Decoder` that was loaded from a Hugging Face folder keeps it, and `save_huggingface` writes it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Companions:
    """Tokenizer files, chat templates, defaults of generation and token ids, as they were in a folder.

    Attributes:
        entries: Entries of `config.json` that concern tokens, such as `eos_token_id`.
        files: Contents of files, by their names within the folder, such as `tokenizer.json`.
    """

    entries: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
