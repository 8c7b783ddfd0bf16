"""Tokens shaded by weight: as a picture, as HTML and for the terminal."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stabmon.figures.canvas import GREY, new_axes, saved, titled
from stabmon.figures.labels import drawable, plain_token
from stabmon.figures.weights import HATCHED, highest, largest_first, weight_table

COLUMNS = 88
"""Characters per line of the picture."""
MOST_TOKENS = 600
"""Tokens of one picture; of more, the heaviest stretch is drawn."""


def text_figure(
    tokens: Sequence[str],
    weights: np.ndarray,
    *,
    unit: str = "share",
    title: str = "Weight of every token",
    marked: int | None = None,
    path: str | Path | None = None,
) -> Any:
    """Draw tokens in reading order, each in a box shaded by its weight.

    Args:
        tokens: the ``S`` tokens.
        weights: ``[S]``, not negative; NaN is grey.
        unit: unit of the weights.
        title: title of the figure.
        marked: position framed in black, such as the target; None for none.
        path: file to save to; None saves nothing.

    Returns:
        The figure.

    Raises:
        ValueError: if tokens and weights do not fit.

    Example:
        >>> figure = text_figure(["The", " cat"], np.array([0.25, 0.75]))
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['The', '␣cat']
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.patches import Rectangle

    weights = _checked(tokens, weights)
    begin, end = _heaviest_stretch(weights, MOST_TOKENS)
    labels = [drawable(plain_token(token, 24)) for token in tokens[begin:end]]
    places = _places(labels, tokens[begin:end])
    lines = max((row for row, _ in places), default=0) + 1
    figure, axes = new_axes(10.0, 1.3 + 0.27 * lines)
    norm, colours = Normalize(0.0, highest(weights)), colormaps["Blues"]
    for label, (row, left), weight, position in zip(
        labels, places, weights[begin:end], range(begin, end), strict=True
    ):
        known = bool(np.isfinite(weight))
        framed = position == marked
        box = Rectangle(
            (left, row + 0.06),
            len(label),
            0.88,
            facecolor=colours(0.9 * norm(weight)) if known else GREY,
            edgecolor="black" if framed else "0.85",
            linewidth=2.0 if framed else 0.4,
            zorder=3 if framed else 2,
        )
        axes.add_patch(box)
        axes.text(
            left + len(label) / 2,
            row + 0.52,
            label,
            ha="center",
            va="center",
            family=["DejaVu Sans Mono", "DejaVu Sans"],
            fontsize=9,
            color="white" if known and norm(weight) > 0.55 else "black",
            parse_math=False,
            zorder=4,
        )
    axes.set_xlim(-0.5, COLUMNS + 1)
    axes.set_ylim(lines + 0.1, -0.1)
    axes.set_axis_off()
    bar = ScalarMappable(norm, ListedColormap(colours(np.linspace(0.0, 0.9, 256))))
    high = 0.4 / (1.3 + 0.27 * lines)
    figure.colorbar(bar, ax=axes, label=unit, location="bottom", fraction=high, aspect=60)
    cut = f"tokens {begin} to {end - 1} of {len(tokens)}" if end - begin < len(tokens) else ""
    seen = marked is not None and begin <= marked < end
    titled(figure, title, cut, "framed in black: the target" if seen else "")
    return saved(figure, path)


def text_html(
    tokens: Sequence[str],
    weights: np.ndarray,
    *,
    unit: str = "share",
    marked: int | None = None,
    most: int = 20,
) -> str:
    """Write tokens shaded by weight as HTML, with numbers on hover and in a table.

    Tokens are escaped and isolated in their writing direction; no script and no style sheet is
    needed. Colours are one translucent blue, so that the fragment is readable on light and dark.

    Args:
        tokens: the ``S`` tokens.
        weights: ``[S]``, not negative; NaN is hatched.
        unit: unit of the weights.
        marked: position with a border, such as the target; None for none.
        most: rows of the table, the largest weights first.

    Returns:
        A ``<div class="tokens">`` and a ``<table>``.

    Raises:
        ValueError: if tokens and weights do not fit.

    Example:
        >>> page = text_html(["<b>", "x"], np.array([0.75, 0.25]))
        >>> "&lt;b&gt;" in page, "<b>" in page, 'title="0: 0.75 share"' in page
        (True, False, True)
    """
    weights = _checked(tokens, weights)
    high = highest(weights)
    spans = []
    for position, (token, weight) in enumerate(zip(tokens, weights, strict=True)):
        style = HATCHED
        if np.isfinite(weight):
            style = f"background:rgba(30,110,235,{0.85 * max(0.0, weight) / high:.3f})"
        if position == marked:
            style += ";outline:2px solid currentColor"
        tip = html.escape(f"{position}: {weight:.4g} {unit}", quote=True)
        word = _escaped(_readable(token))
        spans.append(f'<span style="{style}" title="{tip}"><bdi>{word}</bdi></span>')
        if "\n" in token:
            spans.append("<br>")
    order = largest_first(weights, most)
    rows = [
        (str(at), f"<bdi>{_escaped(plain_token(tokens[at], 60))}</bdi>", f"{weights[at]:.4g}")
        for at in order
    ]
    caption = f"the {len(order)} largest of {len(tokens)}" if len(order) < len(tokens) else "all"
    return (
        '<div class="tokens" style="line-height:1.9;white-space:pre-wrap;overflow-wrap:anywhere">'
        f"{''.join(spans)}</div>" + weight_table(("position", "token", unit), rows, caption)
    )


def text_terminal(tokens: Sequence[str], weights: np.ndarray, *, marked: int | None = None) -> Any:
    """Write tokens for a terminal, each with a digit up to 9 for the largest weight.

    The terminal's own colours are used, so that light and dark ones are readable, and the digit
    carries the weight without them: tenths of the largest, none below a tenth. ``?`` stands for
    NaN, brackets for the marked position.

    Args:
        tokens: the ``S`` tokens.
        weights: ``[S]``, not negative.
        marked: position in brackets; None for none.

    Returns:
        A ``rich.text.Text``; control characters in tokens are written as ``·``.

    Raises:
        ValueError: if tokens and weights do not fit.

    Example:
        >>> text_terminal(["a", " cat", "."], np.array([0.1, 0.9, 0.01])).plain
        'a₁ cat₉.'
    """
    from rich.text import Text

    weights = _checked(tokens, weights)
    high = highest(weights)
    text = Text()
    for position, (token, weight) in enumerate(zip(tokens, weights, strict=True)):
        word = f"[{_readable(token)}]" if position == marked else _readable(token)
        if not np.isfinite(weight):
            style, digit = "red", "?"
        else:
            level = min(9, int(10 * max(0.0, weight) / high))
            style = "bold reverse" if level >= 7 else "bold" if level >= 3 else ""
            digit = chr(0x2080 + level) if level else ""
        text.append(word, style)
        text.append(digit, "cyan")
        if "\n" in token:
            text.append("\n")
    return text


def _places(labels: Sequence[str], tokens: Sequence[str]) -> list[tuple[int, float]]:
    """Return line and left edge of every label, in lines of ``COLUMNS`` characters."""
    places: list[tuple[int, float]] = []
    line, at = 0, 0.0
    for label, token in zip(labels, tokens, strict=True):
        if at and at + len(label) > COLUMNS:
            line, at = line + 1, 0.0
        places.append((line, at))
        at += len(label) + 0.35
        if "\n" in token:
            line, at = line + 1, 0.0
    return places


def _checked(tokens: Sequence[str], weights: np.ndarray) -> np.ndarray:
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape != (len(tokens),):
        raise ValueError(
            f"{len(tokens)} tokens and weights of shape {weights.shape}: give one each"
        )
    return weights


def _heaviest_stretch(weights: np.ndarray, most: int) -> tuple[int, int]:
    """Return begin and end of the ``most`` neighbouring tokens with the largest sum."""
    if len(weights) <= most:
        return 0, len(weights)
    total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(weights))])
    begin = int(np.argmax(total[most:] - total[:-most]))
    return begin, begin + most


def _readable(token: str) -> str:
    return plain_token(token, 200).replace("␣", " ")


def _escaped(text: str) -> str:
    return html.escape(text.encode("utf-8", "replace").decode(), quote=True)
