"""A griffe extension: docstrings are read as Markdown."""

from __future__ import annotations

from typing import Any

import griffe
from markup import to_markdown


class MarkdownDocstrings(griffe.Extension):
    """Turn the roles, formulas and doctests of each docstring into Markdown."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
