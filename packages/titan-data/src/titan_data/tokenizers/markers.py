"""Which tokens stand before and after each document: chosen by the user, or read from tokenizer_config.json.

Called by `load_tokenizer`, which hands a `Markers` to the tokenizer that it makes.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from titan_data.errors import DataError

AUTO: Final = "auto"
_SHOWN = 12  # names of tokens in a message


@dataclass(frozen=True)
class Markers:
    """The tokens before and after each document, and whether added tokens are matched in text.

    Attributes:
        bos: Name of the token before each document; None for no token; "auto" for what the tokenizer's files say.
        eos: The same for the token after each document.
        match_added_tokens: Whether names of added tokens in a text become these tokens, as in `transformers`; those of
            special tokens never do.
    """

    bos: str | None = AUTO
    eos: str | None = AUTO
    match_added_tokens: bool = False

    def resolve(
        self,
        find: Callable[[str], int | None],
        config: Mapping[str, Any] | None,
        usual: tuple[int | None, int | None],
        names: Iterable[str],
        file: str,
    ) -> tuple[int | None, int | None]:
        """Return the ids of bos and eos.

        A bos that is the eos too, as in GPT-2, is left out unless the config has `add_bos_token`: documents would be
        divided by two equal tokens. `add_eos_token` is of no influence: it is about prompts, and documents need an end.

        Args:
            find: Returns the id of a special token by its name; None if there is none.
            config: Contents of tokenizer_config.json, if there is one.
            usual: bos and eos if neither the user nor the config names them.
            names: Names that can be chosen, for messages.
            file: The tokenizer's file, for messages.

        Raises:
            DataError: If there is no token of a chosen name.
        """
        config = config or {}

        def by_name(kind: str, name: str, where: str) -> int:
            if (found := find(name)) is None:
                known = list(names)
                more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
                raise DataError(
                    f"{where} names {name!r} as {kind}, but {file} has no such special token; it has: "
                    f"{', '.join(known[:_SHOWN])}{more}"
                )
            return found

        def look_up(kind: str, chosen: str | None, usual: int | None) -> int | None:
            if chosen != AUTO:
                return None if chosen is None else by_name(kind, chosen, kind.partition("_")[0])
            if f"{kind}_token" not in config:
                return usual
            name = token_name(config[f"{kind}_token"])
            return None if name is None else by_name(f"{kind}_token", name, "tokenizer_config.json")

        bos, eos = look_up("bos", self.bos, usual[0]), look_up("eos", self.eos, usual[1])
        add_bos = config.get("add_bos_token")
        if self.bos == AUTO and (add_bos is False or (bos == eos and add_bos is not True)):
            bos = None
        return bos, eos


def token_name(value: Any) -> str | None:
    """Return a token's name in a config: a string, or in older files an object with its content."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return None if value is None else str(value)


def parse_config(config: bytes | None, name: str) -> Mapping[str, Any] | None:
    """Parse the tokenizer_config.json next to a tokenizer.

    Args:
        config: Its contents, or None.
        name: The tokenizer's file, for messages.

    Raises:
        DataError: If it is not a JSON object.
    """
    if config is None:
        return None
    try:
        parsed = json.loads(config)
    except ValueError as error:
        raise DataError(f"the tokenizer_config.json next to {name} is corrupt: {error}; download it again") from None
    if not isinstance(parsed, Mapping):
        raise DataError(f"the tokenizer_config.json next to {name} is not a JSON object; download it again")
    return parsed


def is_text(token: str) -> bool:
    """Whether an added token is ordinary text rather than a marker: whitespace, such as runs of spaces for code."""
    return not token.strip(" \t\n\r\u2581")
