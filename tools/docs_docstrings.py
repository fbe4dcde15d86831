"""An extension of griffe (mkdocs.yml names it), which reads docstrings for the reference.

It takes the section "Example:", one of the Google convention's names, for "Examples:", which griffe renders as code.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class ExampleSections(Extension):
    """Renames the sections that griffe would take for a note."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rename the section in one object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
