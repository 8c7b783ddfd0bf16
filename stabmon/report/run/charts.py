"""Line charts over the steps of a run, as inline SVG without script.

Every chart is drawn twice, for a wide and for a narrow screen, so that its letters keep their size;
the page's style shows one of them. Lines differ in dash and letter besides colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from markupsafe import Markup

from stabmon.report.run.axes import Scale, tick_text

WIDE, NARROW = 920, 340
"""Widths of the two drawings in pixels."""
LEFT, RIGHT = 52, 14
"""Room beside the plots in pixels."""
LETTER = 7.0
"""Width of a letter at the charts' font size, in pixels; most are narrower."""
APART = 11
"""Distance of the letters of curves that end at the same place, in pixels."""


@dataclass(frozen=True, eq=False)
class Curve:
    """A line, or the range between two, over steps."""

    x: np.ndarray
    """``[T]`` steps."""
    low: np.ndarray
    high: np.ndarray
    """``[T]``; the same as ``low`` for a line."""
    letter: str = ""
    """Written at its end."""
    style: int = 0
    """Colour and dash, from 0."""


def curve(
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    letter: str = "",
    style: int = 0,
    most: int = 420,
) -> Curve:
    """Make a curve, of the extremes of neighbours where there are more than ``most`` points."""
    steps, values = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(steps) <= most:
        return Curve(steps, values, values, letter, style)
    starts = np.arange(0, len(steps), -(-len(steps) // most))
    finite = np.where(np.isfinite(values), values, np.nan)
    return Curve(
        steps[starts],
        np.fmin.reduceat(finite, starts),
        np.fmax.reduceat(finite, starts),
        letter,
        style,
    )


class Canvas:
    """SVG under construction, with a horizontal axis of steps.

    Args:
        width: in pixels.
        first: step at the left edge of the plots.
        last: step at their right edge.
    """

    def __init__(self, width: int, first: float, last: float) -> None:
        self.width = width
        self.first, self.last = first, max(last, first + 1)
        self.top = 0.0
        """Lower edge of what is drawn so far."""
        self._parts: list[str] = []

    @property
    def right(self) -> float:
        """Right edge of the plots."""
        return self.width - RIGHT

    def x(self, step: float) -> float:
        """Return the place of a step, clipped to the plots."""
        share = (step - self.first) / (self.last - self.first)
        return LEFT + min(1.0, max(0.0, share)) * (self.right - LEFT)

    def add(self, part: str) -> None:
        """Add an element."""
        self._parts.append(part)

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """Write a text, escaped."""
        self.add(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">'
            f"{escape(text)}</text>"
        )

    def title(self, text: str) -> None:
        """Write a heading, shortened to the width, below what is drawn so far."""
        left = LEFT if self.width > NARROW else 4
        room = int((self.right - left) / LETTER)
        short = text if len(text) <= room else f"{text[: room - 1]}…"
        self.text(left, self.top + 14, short, "title")

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """Draw a line."""
        self.add(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>')

    def steps(self, unit: str) -> None:
        """Draw the axis of steps below what is drawn so far."""
        for tick in Scale(self.first, self.last).ticks(4 if self.width < 500 else 9):
            if tick == int(tick):
                text, x = f"{int(tick):,}", self.x(tick)
                ends = x + len(text) * LETTER / 2 > self.width
                self.text(
                    self.right if ends else x,
                    self.top + 14,
                    text,
                    "soft",
                    "end" if ends else "middle",
                )
        self.text(self.right, self.top + 29, f"{unit}s", "soft", "end")
        self.top += 34

    def finish(self, label: str, shown: str) -> str:
        """Return the whole drawing.

        Args:
            label: its description, for screen readers.
            shown: class of the drawing, ``wide`` or ``narrow``.
        """
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="chart {shown}" role="img" '
            f'aria-label="{escape(label)}" viewBox="0 0 {self.width} {self.top:.0f}" '
            f'width="{self.width}" height="{self.top:.0f}" data-first="{self.first:g}" '
            f'data-last="{self.last:g}" data-left="{LEFT}" data-right="{self.right:g}">'
            f"{''.join(self._parts)}</svg>"
        )


@dataclass(frozen=True, eq=False)
class Panel:
    """One plot of a figure."""

    title: str
    curves: Sequence[Curve]
    scale: Scale
    height: int = 120
    levels: Sequence[tuple[float, str]] = ()
    """Value and name of horizontal lines."""
    bad: Sequence[float] = field(default=())
    """Steps whose value is NaN or infinite."""

    def draw(self, canvas: Canvas) -> None:
        """Draw the plot below what is there already."""
        top, bottom = canvas.top + 22, canvas.top + 22 + self.height
        title = self.title + (" (logarithmic)" if self.scale.log else "")
        canvas.title(title)

        def y(value: float) -> float:
            return bottom - self.scale.share(value) * self.height

        for tick in self.scale.ticks(4 if self.height >= 90 else 2):
            canvas.line(LEFT, y(tick), canvas.right, y(tick), "grid")
            canvas.text(LEFT - 5, y(tick) + 4, tick_text(tick), "soft", "end")
        for value, name in self.levels:
            if self.scale.low <= value <= self.scale.high:
                canvas.line(LEFT, y(value), canvas.right, y(value), "level")
                canvas.text(canvas.right, y(value) - 4, name, "soft", "end")
        for each in self.curves:
            path = _path(each, canvas.x, y)
            if path:
                canvas.add(f'<path d="{path}" class="curve style{each.style % 6}"/>')
            self._letter(canvas, each, y)
        for step in self.bad:
            canvas.text(canvas.x(step), top + 10, "✕", "bad", "middle")
        canvas.top = bottom + 6

    def _letter(self, canvas: Canvas, each: Curve, y: Callable[[float], float]) -> None:
        finite = np.flatnonzero(np.isfinite(each.high))
        if each.letter and len(finite):
            at = finite[-1]
            canvas.text(
                min(canvas.x(each.x[at]) + 3, canvas.right - 2) - APART * each.style,
                y(float(each.high[at])) - 3,
                each.letter,
                f"letter style{each.style % 6}",
                "end",
            )


def _path(each: Curve, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    """Return the path of a curve, broken where it is not finite."""
    parts, pen = [], "M"
    for step, low, high in zip(each.x, each.low, each.high, strict=True):
        if not (math.isfinite(low) and math.isfinite(high)):
            pen = "M"
            continue
        at = x(float(step))
        parts.append(f"{pen}{at:.1f} {y(float(low)):.1f}")
        if high != low:
            parts.append(f"L{at:.1f} {y(float(high)):.1f}")
        elif pen == "M":
            parts.append("h.1")  # a lone point is seen by its round cap
        pen = "L"
    return "".join(parts)


def both_widths(
    draw: Callable[[Canvas], None], span: tuple[float, float], label: str, unit: str = "step"
) -> Markup:
    """Draw a figure for wide and for narrow screens.

    Args:
        draw: draws all plots on a canvas.
        span: first and last step.
        label: description for screen readers.
        unit: unit of the steps.

    Returns:
        Two SVG elements.
    """
    found = []
    for width, shown in ((WIDE, "wide"), (NARROW, "narrow")):
        canvas = Canvas(width, *span)
        draw(canvas)
        canvas.steps(unit)
        found.append(canvas.finish(label, shown))
    return Markup("".join(found))


def panels(
    plots: Sequence[Panel], span: tuple[float, float], label: str, unit: str = "step"
) -> Markup:
    """Draw plots below each other over the same steps, for both widths."""

    def draw(canvas: Canvas) -> None:
        for plot in plots:
            plot.draw(canvas)

    return both_widths(draw, span, label, unit)
