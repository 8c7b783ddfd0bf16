"""Turn the reStructuredText of docstrings into Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

_MATH = re.compile(r":math:`([^`]+)`")
_ROLE = re.compile(r":[a-z]+(?::[a-z]+)?:`(~?)([^`]+)`")


def to_markdown(text: str) -> str:
    """Return a docstring as Markdown: formulas in dollars, roles as code, doctests fenced.

    Args:
        text: a docstring whose indentation has been cleaned.

    Example:
        >>> to_markdown("The norm :math:`x^2` of :class:`~a.b.Vector`.")
        'The norm $x^2$ of `Vector`.'
    """
    text = _MATH.sub(_formula, text)
    text = _ROLE.sub(_named, text)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)  # griffe knows the plural
    return "\n".join(_fenced(re.sub(r"::$", ":", text, flags=re.MULTILINE)))


def cell(text: str) -> str:
    """Return a docstring as one cell of a table.

    Example:
        >>> cell("one of a|b,\\n    or none")
        'one of a\\\\|b, or none'
    """
    return " ".join(to_markdown(textwrap.dedent(text)).split()).replace("|", r"\|")


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _formula(found: re.Match[str]) -> str:
    """Return a formula in dollars, on one line and without a bar that would end a table's cell."""
    formula = " ".join(found[1].split()).replace(r"\|", r"\Vert ")
    return f"${formula.strip()}$"


def _named(found: re.Match[str]) -> str:
    """Return a role as code: the last part of the name where the role is marked by ``~``."""
    name = found[2].rpartition(".")[2] if found[1] else found[2]
    return f"`{name}`"


def _fenced(text: str) -> Iterator[str]:
    """Yield the lines of a text, doctests at its margin fenced as code."""
    inside = False
    for line in text.split("\n"):
        starts, ends = line.startswith(">>> ") and not inside, inside and not line.strip()
        if starts:
            yield "```pycon"
        if ends:
            yield "```"
        inside = (inside or starts) and not ends
        yield line
    if inside:
        yield "```"
