"""Make, label and save figures: what all of the figures share."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

GREY = "0.72"
"""What stands for NaN."""
MAP = "cividis"
"""Colours of shares and probabilities: lightness grows evenly, also for colour-blind readers."""
LINES: tuple[tuple[str, Any, str], ...] = (
    ("#000000", "-", "o"),
    ("#0072B2", "--", "s"),
    ("#D55E00", "-.", "^"),
    ("#009E73", ":", "D"),
    ("#CC79A7", (0, (5, 1, 1, 1)), "v"),
    ("#56B4E9", (0, (1, 1)), "P"),
    ("#8B6F00", (0, (7, 2)), "X"),
    ("#7A4FBF", (0, (3, 1, 1, 1, 1, 1)), "*"),
)
"""Colour, dash and marker of the n-th line; each differs from the others without its colour."""
HATCHES = ("", "///", "...", "xx", "\\\\\\", "++", "oo", "--")


def new_figure(width: float, height: float) -> Any:
    """Make an empty figure that pyplot does not know of; sizes in inches.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('matplotlib is not installed: pip install "stabmon[report]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def saved(figure: Any, path: str | Path | None) -> Any:
    """Save the figure where a path is given, and return it.

    Raises:
        ValueError: if the suffix is none that matplotlib writes.
    """
    if path is not None:
        with quiet_glyphs():
            figure.savefig(path, dpi=resolution(figure))
    return figure


def resolution(figure: Any) -> float:
    """Dots an inch to save a figure with: 150, or what its own setting asks for beyond."""
    return float(max(150.0, figure.dpi))


@contextmanager
def quiet_glyphs() -> Iterator[None]:
    """Hold back matplotlib's warnings of glyphs that no installed font has."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        yield


def ticks(count: int, most: int = 32) -> list[int]:
    """Choose at most ``most`` of the places 0 … count - 1, evenly apart.

    >>> ticks(5), ticks(10, most=4)
    ([0, 1, 2, 3, 4], [0, 3, 6, 9])
    """
    return list(range(0, count, -(-count // most))) if count else []


def plain_token(token: str, most: int = 14) -> str:
    r"""Write a token so that it can stand on an axis: one line, visible blanks, bounded length.

    Args:
        token: any text, also empty, with line breaks, controls or lone surrogates.
        most: longest label in characters; longer tokens end in ``…``.

    >>> plain_token(" the"), plain_token("a\n"), plain_token("x" * 20, most=5)
    ('␣the', 'a↵', 'xxxx…')
    """
    shown = []
    for sign in token:
        if sign in "\n\r":
            shown.append("↵")
        elif sign == "\t":
            shown.append("→")
        elif sign == " ":
            shown.append("␣")
        elif unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            shown.append("·")
        else:
            shown.append(sign)
    text = "".join(shown) or "∅"
    return text if len(text) <= most else f"{text[: most - 1]}…"


def drawable(text: str) -> str:
    """Replace each character that matplotlib's own font cannot draw by a box.

    >>> drawable("aé日")
    'aé□'
    """
    known = _glyphs()
    return "".join(sign if ord(sign) in known else "□" for sign in text)


@cache
def _glyphs() -> frozenset[int]:
    """The code points of DejaVu Sans, which comes with matplotlib."""
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    font = FT2Font(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"))
    return frozenset(font.get_charmap())


def axis_labels(
    axes: Any,
    which: str,
    count: int,
    labels: Sequence[str] | None = None,
    *,
    most: int = 16,
    room: int = 40,
    pooled: int = 1,
) -> bool:
    """Set an axis' ticks: every label if there is room for all of them, else some positions.

    Args:
        axes: matplotlib's axes.
        which: ``x`` or ``y``.
        count: places along the axis.
        labels: one a place; None for positions.
        most: positions that are written.
        room: labels that there is room for; of more, positions are written instead.
        pooled: positions that one place stands for; labels are left out where it is above 1.

    Returns:
        Whether all labels are written.
    """
    place = ticks(count, most)
    texts = [str(at * pooled) for at in place]
    named = False
    if labels is not None and len(labels) == count and count <= room and pooled == 1:
        place, texts, named = list(range(count)), [drawable(str(label)) for label in labels], True
    setter = axes.set_xticks if which == "x" else axes.set_yticks
    longest = max(map(len, texts), default=0)
    turned = (
        {"rotation": 90} if which == "x" and named and longest > 2 and count * longest > 48 else {}
    )
    setter(place, texts, parse_math=False, **turned)
    return named


def token_labels(tokens: Sequence[str] | None) -> list[str] | None:
    """Write tokens as labels of an axis, see :func:`plain_token`."""
    return None if tokens is None else [plain_token(token) for token in tokens]


def block_max(matrix: np.ndarray, side: int) -> tuple[np.ndarray, int]:
    """Pool the last two axes by the maximum of square blocks until neither is longer than ``side``.

    Args:
        matrix: ``[..., Q, K]``, any unit; NaN counts as a block's value only if all of it is NaN.
        side: longest axis that is left.

    Returns:
        The pooled array and the block's side; 1 if nothing had to be pooled.

    >>> block_max(np.arange(16.0).reshape(4, 4), side=2)
    (array([[ 5.,  7.],
           [13., 15.]]), 2)
    """
    factor = -(-max(matrix.shape[-2:]) // side)
    return (matrix, 1) if factor <= 1 else (block_max_by(matrix, factor), factor)


def block_max_by(matrix: np.ndarray, factor: int) -> np.ndarray:
    """Pool the last two axes by the maximum of square blocks of a side, see :func:`block_max`.

    >>> block_max_by(np.arange(9.0).reshape(3, 3), 2)
    array([[4., 5.],
           [7., 8.]])
    """
    rows, columns = matrix.shape[-2:]
    wide = [(0, 0)] * (matrix.ndim - 2) + [(0, -rows % factor), (0, -columns % factor)]
    kind = matrix.dtype if matrix.dtype.kind == "f" else np.dtype(np.float64)
    padded = np.pad(matrix.astype(kind), wide, constant_values=np.nan)
    up, across = padded.shape[-2] // factor, padded.shape[-1] // factor
    blocks = padded.reshape(*matrix.shape[:-2], up, factor, across, factor)
    pooled: np.ndarray = np.fmax.reduce(np.fmax.reduce(blocks, axis=-1), axis=-2)
    return pooled


def pooled_note(factor: int) -> str:
    """Say in words how many positions a cell stands for; empty for 1.

    >>> pooled_note(4)
    'each cell is the largest of 4 × 4 pairs'
    """
    return f"each cell is the largest of {factor} × {factor} pairs" if factor > 1 else ""


def titled(figure: Any, title: str, note: str = "") -> None:
    """Give a figure a title, and a smaller note under it."""
    figure.suptitle(f"{title}\n{note}" if note else title, fontsize=11, parse_math=False)


def image(
    axes: Any,
    matrix: np.ndarray,
    *,
    limits: tuple[float | None, float | None] = (None, None),
    power: float = 1.0,
    cmap: str = MAP,
    aspect: str = "auto",
) -> Any:
    """Draw a matrix in exact pixels, NaN and infinities grey.

    Args:
        axes: matplotlib's axes.
        matrix: ``[rows, columns]``.
        limits: smallest and largest value of the scale; None for the matrix' own.
        power: of the scale; 0.5 shows small shares beside large ones.
        cmap: matplotlib's colour map.
        aspect: ``auto`` or ``equal``.
    """
    from matplotlib.colors import Normalize, PowerNorm

    finite = matrix[np.isfinite(matrix)]
    low = limits[0] if limits[0] is not None else float(finite.min()) if finite.size else 0.0
    high = limits[1] if limits[1] is not None else float(finite.max()) if finite.size else 1.0
    if high <= low:
        high = low + 1.0
    norm = Normalize(low, high) if power == 1.0 else PowerNorm(power, low, high)
    axes.set_facecolor(GREY)
    axes.spines[:].set_visible(False)  # they would hide part of the first and last cells
    values = np.ma.masked_invalid(matrix)
    return axes.imshow(values, norm=norm, cmap=cmap, aspect=aspect, interpolation="nearest")
