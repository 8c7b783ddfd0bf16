"""Readings of a run and its open issues, as rules judge them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from stabmon.records import StabilityIssue
from stabmon.rules.evidence.robust_stats import largest
from stabmon.rules.tracking.reading_arrays import LooksBack, ReadingArrays


class History(ReadingArrays):
    """Bounded record of readings, as rules judge it.

    T readings (oldest first), N heads over all layers in a fixed order (``heads[n]`` is ``(layer,
    head)``). A layer that comes late or misses a reading is NaN where it is missing. One that
    has another number of heads is NaN at that reading, and begins anew at the second in a row; the
    others keep their past.

    Args:
        length: readings kept; older ones are dropped, but a head's ``baseline`` is kept.
        baseline_length: number of a head's first readings that make up its baseline.
        looks_back: what is kept of a model of more than
            :data:`~stabmon.rules.tracking.history_table.WIDE` heads; None for all. Readings but the
            newest then have no values of layers.

    Raises:
        ValueError: if ``length`` is below 2 or ``baseline_length`` below 1.

    Example:
        >>> from stabmon.records import Reading
        >>> history = History()
        >>> for step, score in ((10, 3.0), (20, 4.0)):
        ...     history.add(Reading(step, 2.5, {"attn": {"max_logit": np.array([score, 1.0])}}))
        >>> history.signal("max_logit")
        array([[3., 1.],
               [4., 1.]])
        >>> history.heads[0], history.steps.tolist()
        (('attn', 0), [10, 20])
    """

    def __init__(
        self, length: int = 256, baseline_length: int = 5, looks_back: LooksBack | None = None
    ) -> None:
        super().__init__(length, baseline_length, looks_back)
        self._open: dict[str, dict[tuple[str | None, int | None], float]] = {}
        self._alarmed: set[tuple[str, str | None]] = set()
        """Threshold of every open issue, by type, layer and head."""

    def is_open(self, issue_type: str) -> np.ndarray:
        """Return ``[N]`` bool: the head has an open issue of this type."""
        is_open = np.zeros(len(self.heads), dtype=bool)
        is_open[[n for n, _ in self._open_heads(issue_type)]] = True
        return is_open

    def is_open_at(
        self, issue_type: str, layer: str | None = None, head: int | None = None
    ) -> bool:
        """Return True if an issue of this type is open for exactly this place.

        Args:
            issue_type: type of the issue.
            layer: qualified name; None for the run.
            head: query head; None for the layer.
        """
        return (layer, head) in self._open.get(issue_type, {})

    def is_alarmed_at(self, issue_type: str, layer: str | None) -> bool:
        """Return True if an alarm of this type is open at a layer or any of its heads.

        Args:
            issue_type: type of the issue.
            layer: qualified name; None for the run.
        """
        return (issue_type, layer) in self._alarmed

    def open_level_at(
        self, issue_type: str, layer: str | None = None, head: int | None = None
    ) -> float:
        """Return the threshold of the open issue of exactly this place.

        Args:
            issue_type: type of the issue.
            layer: qualified name; None for the run.
            head: query head; None for the layer.

        Returns:
            NaN where none is open, or it is older than the history.
        """
        return self._open.get(issue_type, {}).get((layer, head), np.nan)

    def open_level(self, issue_type: str) -> np.ndarray:
        """Return ``[N]`` thresholds of the heads' open issues, the reference of hysteresis.

        NaN where none is open, and once the issue is older than the history: what has lasted that
        long is the head's new normal.
        """
        levels = np.full(len(self.heads), np.nan)
        for n, level in self._open_heads(issue_type):
            levels[n] = level
        return levels

    def _open_heads(self, issue_type: str) -> Iterator[tuple[int, float]]:
        """Yield column and threshold of each head's open issue of a type."""
        for (layer, head), level in self._open.get(issue_type, {}).items():
            if layer in self._spans and head is not None:
                where = self._spans[layer]
                if head < where.stop - where.start:
                    yield where.start + head, level

    def series(self, signal: str, issue: StabilityIssue) -> np.ndarray:
        """Return ``[T]`` values of a signal at the place of an issue.

        Of a layer without a head the largest over its heads, or over those in the issue's evidence
        (``heads_grown``); NaN where nothing was measured.

        Args:
            signal: name of the signal.
            issue: its layer and head are the place.
        """
        if issue.layer not in self.layers:
            return np.full(len(self), np.nan)
        rows = self.rows(signal, slice(None), self.of_layer(issue.layer))
        heads = issue.evidence.get("heads_grown") if issue.head is None else [issue.head]
        if heads and max(heads) >= rows.shape[1]:  # the layer has fewer heads by now
            return np.full(len(self), np.nan)
        return largest(rows[:, heads].T if heads else rows.T)

    def value_at(self, signal: str, issue: StabilityIssue) -> float | None:
        """Return the newest value of a signal at the place of an issue; None if not measured.

        Args:
            signal: name of the signal.
            issue: its layer and head are the place.
        """
        value = float(self.series(signal, issue)[-1]) if len(self) else np.nan
        return None if np.isnan(value) else value

    def set_open(self, issues: Iterable[tuple[StabilityIssue, int]]) -> None:
        """Set the issues that are open, each with the step at which it opened."""
        self._open, self._alarmed = {}, set()
        oldest = self.readings[0].step if self.readings else 0
        for issue, since in issues:
            level = issue.threshold if since >= oldest else np.nan
            self._open.setdefault(issue.issue_type, {})[issue.layer, issue.head] = level
            if issue.is_alarm:
                self._alarmed.add((issue.issue_type, issue.layer))
