"""Weights of tokens and patches: their scale, and their table in HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

HATCHED = "background:repeating-linear-gradient(45deg,#999 0 2px,transparent 2px 6px)"
"""CSS of a weight that is NaN."""


def highest(weights: np.ndarray) -> float:
    """Return the largest finite weight; 1 if none is positive.

    >>> highest(np.array([0.2, 0.5, np.nan])), highest(np.zeros(2))
    (0.5, 1.0)
    """
    finite = weights[np.isfinite(weights)]
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def largest_first(weights: np.ndarray, most: int) -> list[int]:
    """Return the flat places of the ``most`` largest weights, NaN last.

    >>> largest_first(np.array([0.2, np.nan, 0.5]), 2)
    [2, 0]
    """
    order = np.argsort(np.where(np.isfinite(weights), -weights, np.inf).ravel(), kind="stable")
    return [int(at) for at in order[:most]]


def weight_table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """Write a table of weights as HTML.

    Args:
        head: names of the columns, plain text.
        rows: cells that are HTML already.
        caption: text above the table, plain text.

    Returns:
        A ``<table class="weights">``.

    Example:
        >>> weight_table(["token", "share"], [["a", "0.5"]], "all")[:47]
        '<table class="weights"><caption>all</caption><t'
    """
    titles = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<table class="weights"><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"
    )
