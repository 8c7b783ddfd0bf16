"""Small HTML of objects, for notebooks in dark and in light.

Text keeps the notebook's own colour; severities are words, and colours only repeat them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape as _escape

import numpy as np

from stabmon._display.bars import bars

EDGES = {"info": "#888", "warning": "#c80", "error": "#d33", "critical": "#d33"}
"""Edge colour by severity, readable on black and on white."""
_CARD = "border-left:4px solid {edge};padding:2px 0 2px 10px;margin:4px 0;line-height:1.4"
_CELL = "text-align:left;vertical-align:top;padding:1px 12px 1px 0;background:none"
_PRE = "line-height:1.15;margin:4px 0;background:none;color:inherit;overflow-x:auto"
MOST_ROWS = 12
"""Rows of a table; further ones are counted."""
MOST_LAYERS = 40
"""Layers of a map; of more, an even choice."""


def escape(text: object) -> str:
    """Return text for HTML, on one line.

    >>> escape("a<b>\\n&")
    'a&lt;b&gt; &amp;'
    """
    return _escape(" ".join(str(text).split()))


def card(title: str, *parts: str, severity: str = "info") -> str:
    """Return a box with a title and parts of HTML below it.

    Args:
        title: plain text, bold.
        *parts: HTML, made by the functions here.
        severity: colours the edge.

    Example:
        >>> "<b>Issue</b>" in card("Issue", line("a < b"), severity="error")
        True
    """
    style = _CARD.format(edge=EDGES.get(severity, EDGES["info"]))
    return f'<div style="{style}"><b>{escape(title)}</b>{"".join(parts)}</div>'


def line(text: object) -> str:
    """Return plain text as a line of its own; nothing for empty text."""
    return f"<div>{escape(text)}</div>" if str(text) else ""


def code(text: str) -> str:
    """Return lines of code as they are; nothing for empty text."""
    return f'<pre style="{_PRE}">{_escape(text)}</pre>' if text else ""


def table(head: Sequence[str], rows: Sequence[Sequence[object]], most: int = MOST_ROWS) -> str:
    """Return a table of plain text; nothing without a row.

    Args:
        head: titles of the columns.
        rows: one sequence per row.
        most: rows shown; the others are counted.
    """
    if not rows:
        return ""
    body = "".join(_row("td", row) for row in rows[:most])
    more = line(f"and {len(rows) - most} more") if len(rows) > most else ""
    inner = _row("th", head) + body
    return f'<table style="border-collapse:collapse;margin:4px 0">{inner}</table>{more}'


def head_map(
    rows: Mapping[str, np.ndarray],
    limits: tuple[float | None, float | None],
    marks: Mapping[tuple[str, int], str],
    caption: str,
) -> str:
    """Return a map with one line per layer and one bar per head; nothing without a layer.

    Args:
        rows: layer -> ``[H]``.
        limits: values of the lowest and the highest bar; None for those of all values.
        marks: (layer, head) -> letter that stands in its place.
        caption: plain text; the meaning of bars and letters.

    Example:
        >>> head_map({"h.0": np.array([0.0, 1.0])}, (0, 1), {("h.0", 1): "E"}, "").count("▁<b>E</b>")
        1
    """
    if not rows:
        return ""
    finite = np.concatenate([values[np.isfinite(values)] for values in rows.values()] + [[]])
    low, high = (
        given if given is not None else found
        for given, found in zip(
            limits, (min(finite, default=0), max(finite, default=1)), strict=True
        )
    )
    names = list(rows)[:: -(-len(rows) // MOST_LAYERS)]
    width = max(len(name) for name in names)
    text = []
    for name in names:
        cells = (
            f"<b>{escape(marks[name, head])}</b>" if (name, head) in marks else bar
            for head, bar in enumerate(bars(rows[name], (low, high)))
        )
        text.append(f"{_escape(name.ljust(width))} {''.join(cells)}")
    if len(names) < len(rows):
        caption = f"{len(names)} of {len(rows)} layers. {caption}"
    return f'<pre style="{_PRE}">{chr(10).join(text)}</pre>{line(caption)}'


def _row(tag: str, cells: Iterable[object]) -> str:
    shown = "".join(f'<{tag} style="{_CELL}">{escape(cell)}</{tag}>' for cell in cells)
    return f'<tr style="background:none">{shown}</tr>'
