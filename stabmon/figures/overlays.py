"""Weights laid over what they belong to: tokens shaded by weight, and patches of an image.

As a picture, as a fragment of HTML (numbers on hover and in a table) and for the terminal.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stabmon.figures.canvas import (
    GREY,
    drawable,
    image,
    new_figure,
    plain_token,
    saved,
    titled,
)

COLUMNS = 88
"""Characters a line of the picture holds."""
MOST_TOKENS = 600
"""Tokens of one picture; of more the heaviest stretch is drawn."""


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
        unit: of the weights.
        title: what is shown.
        marked: position framed in black, such as the target; None for none.
        path: file to save; None for none.

    Raises:
        ValueError: if tokens and weights do not fit.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    weights = _fitting(tokens, weights)
    begin, end = _stretch(weights, MOST_TOKENS)
    labels = [drawable(plain_token(token, 24)) for token in tokens[begin:end]]
    places: list[tuple[int, float]] = []
    line, at = 0, 0.0
    for label, token in zip(labels, tokens[begin:end], strict=True):
        if at and at + len(label) > COLUMNS:
            line, at = line + 1, 0.0
        places.append((line, at))
        at += len(label) + 0.35
        if "\n" in token:
            line, at = line + 1, 0.0
    high = _highest(weights)
    lines = max((row for row, _ in places), default=0) + 1
    figure = new_figure(10.0, 1.3 + 0.27 * lines)
    axes = figure.add_subplot()
    norm, colours = Normalize(0.0, high), colormaps["Blues"]
    for label, (row, left), weight, position in zip(
        labels, places, weights[begin:end], range(begin, end), strict=True
    ):
        known = bool(np.isfinite(weight))
        colour = colours(0.9 * norm(weight)) if known else GREY
        framed = position == marked
        axes.add_patch(
            Rectangle(
                (left, row + 0.06),
                len(label),
                0.88,
                facecolor=colour,
                edgecolor="black" if framed else "0.85",
                linewidth=2.0 if framed else 0.4,
                zorder=3 if framed else 2,
            )
        )
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
    bar = ScalarMappable(norm, _lighter(colours))
    figure.colorbar(
        bar, ax=axes, label=unit, location="bottom", fraction=0.4 / (1.3 + 0.27 * lines), aspect=60
    )
    note = f"tokens {begin} to {end - 1} of {len(tokens)}" if end - begin < len(tokens) else ""
    if marked is not None and begin <= marked < end:
        note = "; ".join(part for part in (note, "framed in black: the target") if part)
    titled(figure, title, note)
    return saved(figure, path)


def text_html(
    tokens: Sequence[str],
    weights: np.ndarray,
    *,
    unit: str = "share",
    marked: int | None = None,
    most: int = 20,
) -> str:
    """Write tokens shaded by weight as HTML: the number on hover, the largest in a table.

    Tokens are escaped and isolated in their writing direction; no script and no style sheet is
    needed. Colours are one translucent blue, so that the fragment is readable on light and dark.

    Args:
        tokens: the ``S`` tokens.
        weights: ``[S]``, not negative; NaN is hatched.
        unit: of the weights.
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
    weights = _fitting(tokens, weights)
    high = _highest(weights)
    spans = []
    for position, (token, weight) in enumerate(zip(tokens, weights, strict=True)):
        if np.isfinite(weight):
            look = f"background:rgba(30,110,235,{0.85 * max(0.0, weight) / high:.3f})"
        else:
            look = "background:repeating-linear-gradient(45deg,#999 0 2px,transparent 2px 6px)"
        if position == marked:
            look += ";outline:2px solid currentColor"
        tip = html.escape(f"{position}: {weight:.4g} {unit}", quote=True)
        word = _escaped(plain_token(token, 200).replace("␣", " "))
        spans.append(f'<span style="{look}" title="{tip}"><bdi>{word}</bdi></span>')
        if "\n" in token:
            spans.append("<br>")
    order = np.argsort(np.where(np.isfinite(weights), -weights, np.inf), kind="stable")[:most]
    rows = "".join(
        f"<tr><td>{int(at)}</td><td><bdi>{_escaped(plain_token(tokens[at], 60))}</bdi></td><td>{weights[at]:.4g}</td></tr>"
        for at in order
    )
    head = f"<tr><th>position</th><th>token</th><th>{html.escape(unit)}</th></tr>"
    caption = f"the {len(order)} largest of {len(tokens)}" if len(order) < len(tokens) else "all"
    return (
        '<div class="tokens" style="line-height:1.9;white-space:pre-wrap;overflow-wrap:anywhere">'
        f"{''.join(spans)}</div>"
        f'<table class="weights"><caption>{caption}</caption><thead>{head}</thead><tbody>{rows}</tbody></table>'
    )


def text_terminal(tokens: Sequence[str], weights: np.ndarray, *, marked: int | None = None) -> Any:
    """Write tokens for a terminal: each with a digit from 1 to 9, the largest weight.

    The terminal's own colours are used, so that light and dark ones are readable, and the digit
    carries the weight without them: tenths of the largest, none below a tenth. ``?`` stands for
    NaN, brackets for the marked position.

    Args:
        tokens: the ``S`` tokens.
        weights: ``[S]``, not negative.
        marked: position in brackets; None for none.

    Returns:
        A ``rich.text.Text``; control characters in tokens are written as ``·``.

    Example:
        >>> text_terminal(["a", " cat", "."], np.array([0.1, 0.9, 0.01])).plain
        'a₁ cat₉.'
    """
    from rich.text import Text

    weights = _fitting(tokens, weights)
    high = _highest(weights)
    text = Text()
    for position, (token, weight) in enumerate(zip(tokens, weights, strict=True)):
        level = min(9, int(10 * max(0.0, weight) / high)) if np.isfinite(weight) else None
        word = plain_token(token, 200).replace("␣", " ")
        if position == marked:
            word = f"[{word}]"
        digit = "?" if level is None else chr(0x2080 + level) if level else ""
        style = (
            "red"
            if level is None
            else "bold reverse"
            if level >= 7
            else "bold"
            if level >= 3
            else ""
        )
        text.append(word, style)
        text.append(digit, "cyan")
        if "\n" in token:
            text.append("\n")
    return text


def image_figure(
    picture: np.ndarray,
    grid: np.ndarray,
    *,
    unit: str = "share",
    title: str = "Weight of every patch",
    path: str | Path | None = None,
) -> Any:
    """Draw an image beside itself under the weights of its patches.

    Args:
        picture: ``[height, width, 3]`` in [0, 1], or 0 to 255 as uint8.
        grid: ``[rows, columns]`` weights of the patches, not negative; NaN is grey.
        unit: of the weights.
        title: what is shown.
        path: file to save; None for none.

    Returns:
        The figure: the image, the image darkened where weights are small, and the weights alone.
    """
    picture, grid = _rgb(picture), np.asarray(grid, dtype=np.float64)
    height, width = picture.shape[:2]
    figure = new_figure(11.0, 1.1 + 3.3 * height / width)
    plain, over, alone = figure.subplots(1, 3)
    high = _highest(grid)
    plain.imshow(picture)
    plain.set_title("image", fontsize=10)
    rows = np.arange(height) * grid.shape[0] // height
    columns = np.arange(width) * grid.shape[1] // width
    light = np.sqrt(np.clip(np.nan_to_num(grid) / high, 0.0, 1.0))[rows][:, columns, None]
    over.imshow(picture * (0.12 + 0.88 * light))
    over.set_title("image, bright where the weight is", fontsize=10)
    shown = image(alone, grid, limits=(0.0, high), aspect="equal")
    shown.set_extent((0, width, height, 0))
    alone.set_title(f"weights of {grid.shape[0]} × {grid.shape[1]} patches", fontsize=10)
    for axes in (plain, over, alone):
        axes.set_xticks([])
        axes.set_yticks([])
    figure.colorbar(shown, ax=alone, label=unit)
    titled(figure, title)
    return saved(figure, path)


def image_html(
    picture: np.ndarray, grid: np.ndarray, *, unit: str = "share", most: int = 10
) -> str:
    """Write an image, dark where its patches' weights are small, as HTML: numbers on hover too.

    Args:
        picture: ``[height, width, 3]`` in [0, 1], or 0 to 255 as uint8.
        grid: ``[rows, columns]`` weights, not negative; NaN is hatched.
        unit: of the weights.
        most: rows of the table.

    Returns:
        A ``<div class="patches">`` and a ``<table>``; the image is inside as a data URI.
    """
    grid = np.asarray(grid, dtype=np.float64)
    high = _highest(grid)
    source = base64.b64encode(png_of(picture)).decode()
    cells = []
    for (row, column), weight in np.ndenumerate(grid):
        if np.isfinite(weight):
            dark = 0.88 * (1 - np.sqrt(max(0.0, weight) / high))
            look = f"background:rgba(0,0,0,{dark:.3f})"
        else:
            look = "background:repeating-linear-gradient(45deg,#999 0 2px,transparent 2px 6px)"
        tip = html.escape(f"row {row}, column {column}: {weight:.4g} {unit}", quote=True)
        cells.append(f'<i style="{look}" title="{tip}"></i>')
    order = np.argsort(np.where(np.isfinite(grid), -grid, np.inf).ravel(), kind="stable")[:most]
    rows = "".join(
        f"<tr><td>{at // grid.shape[1]}</td><td>{at % grid.shape[1]}</td><td>{grid.flat[at]:.4g}</td></tr>"
        for at in order.tolist()
    )
    shape = _rgb(picture).shape
    return (
        f'<div class="patches" style="position:relative;max-width:28rem;aspect-ratio:{shape[1]}/{shape[0]}">'
        f'<img alt="the analysed image" src="data:image/png;base64,{source}" '
        'style="width:100%;height:100%;image-rendering:pixelated;display:block">'
        '<div style="position:absolute;inset:0;display:grid;'
        f'grid-template-columns:repeat({grid.shape[1]},1fr)">{"".join(cells)}</div></div>'
        f'<table class="weights"><caption>the {len(order)} largest of {grid.size} patches</caption>'
        f"<thead><tr><th>row</th><th>column</th><th>{html.escape(unit)}</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def png_of(picture: np.ndarray) -> bytes:
    """Encode an image ``[height, width, 3]`` as PNG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray((_rgb(picture) * 255).round().astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def _rgb(picture: np.ndarray) -> np.ndarray:
    """``[height, width, 3]`` in [0, 1]; a single channel is repeated."""
    values = np.asarray(picture)
    scaled = values.astype(np.float64) / (255.0 if values.dtype == np.uint8 else 1.0)
    if scaled.ndim == 2:
        scaled = scaled[..., None]
    if scaled.ndim != 3 or scaled.shape[-1] not in (1, 3, 4):
        raise ValueError(f"an image of shape {values.shape}: give [height, width, 3]")
    return np.clip(np.broadcast_to(scaled[..., :3], (*scaled.shape[:2], 3)), 0.0, 1.0)


def _fitting(tokens: Sequence[str], weights: np.ndarray) -> np.ndarray:
    weights = np.asarray(weights, dtype=np.float64)
    if weights.ndim != 1 or len(weights) != len(tokens):
        raise ValueError(
            f"{len(tokens)} tokens and weights of shape {weights.shape}: give one each"
        )
    return weights


def _highest(weights: np.ndarray) -> float:
    finite = weights[np.isfinite(weights)]
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def _stretch(weights: np.ndarray, most: int) -> tuple[int, int]:
    """The stretch of ``most`` tokens with the largest sum; all where there are no more."""
    if len(weights) <= most:
        return 0, len(weights)
    total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(weights))])
    begin = int(np.argmax(total[most:] - total[:-most]))
    return begin, begin + most


def _lighter(colours: Any) -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap(colours(np.linspace(0.0, 0.9, 256)))


def _escaped(text: str) -> str:
    return html.escape(text.encode("utf-8", "replace").decode(), quote=True)
