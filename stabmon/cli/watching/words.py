"""Durations, numbers and names on a screen of characters."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from typing import IO

from rich.text import Text

from stabmon.records import Severity

STYLES: dict[Severity, str] = {
    "info": "",
    "warning": "bold magenta",
    "error": "bold red",
    "critical": "bold red",
}
"""The terminal's own colours, those that are readable on black and on white."""
LOWEST = frozenset({"normalized_entropy", "attention_entropy", "effective_keys"})
"""Signals of which low values are the ones to see."""
ASCII = str.maketrans("▁▂▃▄▅▆▇×…→·", "0123456x~>-")
"""Characters for terminals that cannot show the others; each as wide."""


def age(seconds: float) -> str:
    """Return a duration in its largest unit.

    >>> age(3.7), age(245), age(9000), age(200000)
    ('3 s', '4 min', '2.5 h', '2.3 days')
    """
    if seconds < 60:
        return f"{max(0, int(seconds))} s"
    if seconds < 3600:
        return f"{int(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def number(value: float) -> str:
    """Return a number in at most 8 characters.

    >>> number(10.94), number(1234567), number(0.034), number(float("nan"))
    ('10.9', '1.23e+06', '0.034', 'nan')
    """
    return f"{value:.0f}" if 100 <= abs(value) < 100_000 else f"{value:.3g}"


def in_words(signal: str) -> str:
    """Return a signal's name for a heading.

    >>> in_words("hnf_log_curvature"), in_words("max_logit")
    ('HNF log curvature', 'largest score')
    """
    known = {"max_logit": "largest score", "normalized_entropy": "entropy"}
    return known.get(signal, signal.replace("_", " ").replace("hnf", "HNF"))


def wrapped(text: str, width: int, style: str = "", indent: int = 0) -> list[Text]:
    """Return plain text as lines of at most ``width`` cells, indented."""
    lines = textwrap.wrap(printable(text), max(8, width - indent))
    return [Text(" " * indent + line, style) for line in lines]


def fitting(lines: Sequence[Text], stream: IO[str] | None = None) -> list[Text]:
    """Return lines in characters that a stream can show.

    Args:
        lines: the lines.
        stream: the stream; None for the process's standard output.
    """
    encoding = getattr(stream or sys.__stdout__, "encoding", None) or "utf-8"
    try:
        "▁▇×…→·".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        for line in lines:
            line.plain = line.plain.translate(ASCII)
    return list(lines)


def printable(text: str) -> str:
    """Replace characters that would move the cursor or colour the terminal.

    >>> printable("a\\x1b[31mb")
    'a?[31mb'
    """
    return "".join(sign if sign.isprintable() or sign == "\n" else "?" for sign in text)


def cut(line: Text, width: int) -> Text:
    """Return a line of at most ``width`` cells, the last one an ellipsis where it was longer."""
    line = line.copy()
    line.truncate(width, overflow="ellipsis")
    line.no_wrap = True
    return line
