"""Labels of axes: tokens, layer names, positions."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any


def ticks(count: int, most: int = 32) -> list[int]:
    """Choose at most ``most`` of the places 0 … count - 1, evenly apart.

    Example:
        >>> ticks(5), ticks(10, most=4)
        ([0, 1, 2, 3, 4], [0, 3, 6, 9])
    """
    return list(range(0, count, -(-count // most))) if count else []


def plain_token(token: str, most: int = 14) -> str:
    r"""Write a token as an axis label: one line, visible blanks, bounded length.

    Args:
        token: any text, also empty, with line breaks, controls or lone surrogates.
        most: longest label in characters; longer tokens end in ``…``.

    Example:
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
    """Replace characters missing from matplotlib's own font by a box.

    >>> drawable("aé日")
    'aé□'
    """
    known = _glyphs()
    return "".join(sign if ord(sign) in known else "□" for sign in text)


@cache
def _glyphs() -> frozenset[int]:
    """Return the code points of DejaVu Sans, the font shipped with matplotlib."""
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
    """Write every label on an axis where all fit, else some positions.

    Args:
        axes: matplotlib's axes.
        which: ``x`` or ``y``.
        count: places along the axis.
        labels: one per place; None for positions.
        most: largest number of positions to write.
        room: largest number of labels that fit; with more, positions are written instead.
        pooled: positions that one place stands for; above 1, labels are left out.

    Returns:
        True if the labels are written, False if positions are.
    """
    place = ticks(count, most)
    texts = [str(at * pooled) for at in place]
    named = False
    if labels is not None and len(labels) == count and count <= room and pooled == 1:
        place, texts, named = list(range(count)), [drawable(str(label)) for label in labels], True
    setter = axes.set_xticks if which == "x" else axes.set_yticks
    longest = max(map(len, texts), default=0)
    turned = which == "x" and named and longest > 2 and count * longest > 48
    setter(place, texts, parse_math=False, **({"rotation": 90} if turned else {}))
    return named


def token_labels(tokens: Sequence[str] | None) -> list[str] | None:
    """Write tokens as axis labels by :func:`plain_token`; None stays None."""
    return None if tokens is None else [plain_token(token) for token in tokens]


def short_names(layers: Sequence[str]) -> tuple[list[str], str]:
    """Shorten layer names to the parts in which they differ, and return their pattern.

    Args:
        layers: qualified names, in any order.

    Returns:
        One short name a layer, and the common pattern with ``*`` in their place; empty without one.

    Example:
        >>> short_names(["model.layers.0.self_attn", "model.layers.1.self_attn"])
        (['0', '1'], 'model.layers.*.self_attn')
        >>> short_names(["encoder.0.attn", "decoder.0.attn"])
        (['encoder', 'decoder'], '*.0.attn')
        >>> short_names(["attn"])
        (['attn'], '')
    """
    parts = [layer.split(".") for layer in layers]
    if len(parts) < 2:
        return list(layers), ""
    shortest = min(len(part) for part in parts)
    head = _shared(parts)
    tail = min(_shared([part[::-1] for part in parts]), shortest - head)
    names = [".".join(part[head : len(part) - tail]) or "·" for part in parts]
    pattern = ".".join([*parts[0][:head], "*", *parts[0][len(parts[0]) - tail :]])
    return names, pattern if pattern != "*" else ""


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """Return the number of leading parts that all have in common."""
    return sum(
        1
        for _ in itertools.takewhile(
            lambda column: len(set(column)) == 1, zip(*parts, strict=False)
        )
    )


def shortened(name: str, most: int = 22) -> str:
    """Return the end of a name that is longer than ``most`` characters.

    >>> shortened("attn"), shortened("model.layers.0.self_attn", most=9)
    ('attn', '…elf_attn')
    """
    return name if len(name) <= most else f"…{name[-(most - 1) :]}"


def layer_label(name: str) -> str:
    """Return ``layer 3`` for a short name, the end of a long one.

    >>> layer_label("3"), layer_label("encoder.0")
    ('layer 3', 'encoder.0')
    """
    return drawable(f"layer {name}" if len(name) <= 6 else shortened(name))
