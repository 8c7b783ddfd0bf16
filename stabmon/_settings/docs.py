"""Read the docs of settings out of the dataclasses that declare them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from itertools import pairwise

from stabmon._settings.reader import setting_names


def setting_docs(cls: type) -> dict[str, str]:
    """Return the text below each setting of a dataclass, on one line; empty where there is none.

    Raises:
        OSError: if the source of the class is not at hand.

    Example:
        >>> from stabmon.guard import Budget
        >>> setting_docs(Budget)["max_interventions"]
        'Interventions in a run.'
    """
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(each):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(tree, ast.ClassDef)
        for node, below in pairwise(tree.body):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                text = below.value.value if _is_text(below) else ""  # type: ignore[attr-defined]
                found[node.target.id] = " ".join(text.split())
    return {name: found.get(name, "") for name in setting_names(cls)}


def _is_text(node: ast.stmt) -> bool:
    """Return whether a statement is nothing but a string."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
