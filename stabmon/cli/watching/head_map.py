"""Layers and heads as lines of text: a bar per head, a letter where an issue is open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from rich.text import Text

from stabmon._display.bars import bars
from stabmon.cli.watching.words import STYLES
from stabmon.records import StabilityIssue, is_alarm

_GAP = 1
"""Columns between two layers beside each other."""


@dataclass(frozen=True)
class HeadMap:
    """One signal of every head of some layers, and the open issues on them."""

    names: Sequence[str]
    """Short names of the layers."""
    values: Sequence[np.ndarray]
    """``[H]`` per layer."""
    issues: Sequence[Mapping[int | None, StabilityIssue]]
    """Head -> its worst open issue, per layer; None for the whole layer."""
    limits: tuple[float | None, float | None] = (None, None)
    """Values of the lowest and the highest bar; None for those of all values."""
    lowest: bool = False
    """Low values are the ones to see where heads share a character."""

    def lines(self, width: int, height: int, selected: int | None = None) -> list[Text]:
        """Return the map in at most ``height`` lines of ``width`` cells.

        Layers run downwards, and beside each other where there are more than lines. Heads share a
        character where they must, which then shows the extreme one. Layers that still do not fit
        are left out around the selected one.

        Args:
            width: in cells.
            height: in lines.
            selected: the layer to mark.
        """
        if not self.names or height < 1:
            return []
        label = self._label(width)
        fold, across = self._fit(width, height)
        down = -(-len(self.names) // across)
        first = 0
        if down > height:
            at = 0 if selected is None else selected % down
            down, first = height, min(max(0, at - height // 2), down - height)
        per_column = -(-len(self.names) // across)
        rows = []
        for row in range(first, first + down):
            line = Text()
            for column in range(across):
                layer = column * per_column + row
                if layer < len(self.names) and row < per_column:
                    line.append_text(Text(" " * _GAP if column else ""))
                    line.append_text(self._layer(layer, label, fold, layer == selected))
            rows.append(line)
        return rows

    def heads_per_character(self, width: int, height: int) -> int:
        """Return how many heads share a character at this size."""
        return self._fit(width, height)[0]

    def whole_height(self, width: int) -> int:
        """Return the fewest lines in which each head has a character of its own."""
        across = max(1, (width + _GAP) // (self._label(width) + 1 + self._heads + _GAP))
        return -(-len(self.names) // across)

    @property
    def _heads(self) -> int:
        return max((len(values) for values in self.values), default=1)

    def _label(self, width: int) -> int:
        return min(max(map(len, self.names), default=0), max(4, width // 4))

    def _fit(self, width: int, height: int) -> tuple[int, int]:
        """Return heads per character and layers beside each other."""
        label, heads, fold = self._label(width), self._heads, 1
        while True:
            cell = label + 1 + -(-heads // fold)
            across = max(1, (width + _GAP) // (cell + _GAP))
            if (-(-len(self.names) // across) <= height and cell <= width) or fold >= heads:
                return fold, min(across, -(-len(self.names) // min(height, len(self.names))))
            fold += 1

    def _layer(self, layer: int, label: int, fold: int, selected: bool) -> Text:
        values, issues = self.values[layer], self.issues[layer]
        whole = issues.get(None)
        name = self.names[layer]
        name = name if len(name) <= label else f"…{name[-(label - 1) :]}"
        line = Text(name.rjust(label), "reverse" if selected else "")
        line.append(*((" ", "") if whole is None else mark(whole)))
        parts = [values[start : start + fold] for start in range(0, len(values), fold)]
        extremes = [part.min() if self.lowest else part.max() for part in parts]
        signs = bars(values if fold == 1 else extremes, self.range)
        marks = {head // fold: mark(issue) for head, issue in self._by_weight(layer)}
        for place, sign in enumerate(signs):
            line.append(*marks.get(place, (sign, "cyan")))
        width = -(-self._heads // fold)
        line.append(" " * (width - -(-len(values) // fold)))
        return line

    def _by_weight(self, layer: int) -> list[tuple[int, StabilityIssue]]:
        """Return head and issue of a layer, alarms last."""
        found = [(head, issue) for head, issue in self.issues[layer].items() if head is not None]
        return sorted(found, key=lambda each: is_alarm(each[1].severity))

    @cached_property
    def range(self) -> tuple[float, float]:
        """Values of the lowest and the highest bar."""
        if self.limits != (None, None):
            return self.limits  # type: ignore[return-value]
        finite = np.concatenate([each[np.isfinite(each)] for each in self.values] or [np.zeros(0)])
        return float(finite.min(initial=np.inf)), float(finite.max(initial=-np.inf))


def mark(issue: StabilityIssue) -> tuple[str, str]:
    """Return the letter of an issue and its style; lower case for less than an alarm.

    >>> mark(StabilityIssue(1, "a", 0, "entropy_collapse", "error", 0.1, 0.2, ""))
    ('E', 'bold red')
    """
    return issue.letter, STYLES[issue.severity]
