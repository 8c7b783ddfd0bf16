"""Pictures of all heads now and over the run, for dashboards that show images."""

from __future__ import annotations

import importlib
import logging
import time
from dataclasses import dataclass

import numpy as np

from stabmon.figures.head_history import MOST_COLUMNS, HeadHistory, Scale, head_history, pixels
from stabmon.records import Reading
from stabmon.signals.presentation import presentation_of
from stabmon.sinks.head_images import colour_range, head_image, head_matrix, signal_names

logger = logging.getLogger("stabmon")

EVERY_HEAD = "every_head"
"""Name of the picture that is drawn untouched."""
_FIRST_CHOICE = (("normalized_entropy", "attention_entropy"), ("max_logit",))
"""Signals of that picture: of each group the first that is measured."""
_HINTS = {
    "normalized_entropy": "0: a head looks at one key only (collapsed); 1: at all keys alike",
    "attention_entropy": "0: a head looks at one key only (collapsed)",
    "max_logit": "the largest score before the softmax; keeps growing where attention is unstable",
}
_SCORES = Scale(0.0, 1000.0, log_above=1.0)
_SHARE_OF_TIME = 0.01
"""Largest share of wall time that regular pictures take."""


@dataclass(frozen=True)
class Picture:
    """Image of a dashboard, and its caption."""

    name: str
    image: np.ndarray
    """uint8 ``[height, width, 3]``."""
    caption: str


class HeadPictures:
    """Every head of a run so far, and the pictures of it.

    A picture has the newest matrix (layers × heads) and, beside it, its own history, so that a
    dashboard that keeps few images loses nothing. Where matplotlib or Pillow is missing, that is
    logged once: without the former, pictures are the newest matrix without axes.

    Args:
        each_signal: one picture of each signal, instead of one of entropy and largest score.
        every: readings from one picture to the next. A picture of a signal apart, they also wait
            until the last one has taken no more than 1% of the time.
    """

    def __init__(self, *, each_signal: bool, every: int) -> None:
        self._each_signal, self._every = each_signal, every
        self._readings = 0
        self._past: list[tuple[int, dict[str, dict[str, np.ndarray]]]] = []
        self._marks: dict[str, list[int]] = {"alarm": [], "intervention": []}
        self._scales: dict[str, Scale] = {}
        self._newest: Reading | None = None
        self._drawn_at = (1 - every, -1)
        self._next = -float("inf")
        self._is_checked = self._plain = self._blind = False

    def add(self, reading: Reading) -> list[Picture]:
        """Add a reading, and return the pictures that are due."""
        if not reading.layers:
            return []
        self._newest = reading
        names = self._shown(reading)
        kept = {
            layer: {name: signals[name].astype(np.float32) for name in names if name in signals}
            for layer, signals in reading.layers.items()
        }
        self._past.append((reading.step, kept))
        if len(self._past) > 2 * MOST_COLUMNS:
            self._past = self._past[::2]
        self._readings += 1
        can_wait = not self._each_signal and time.monotonic() < self._next
        return [] if can_wait else self.draw_if_due()

    def draw_if_due(self) -> list[Picture]:
        """Return the pictures if enough readings have come since the last ones."""
        return self.draw() if self._readings - self._drawn_at[0] >= self._every else []

    @property
    def newest_step(self) -> int:
        """Step of the newest reading; 0 before the first."""
        return 0 if self._newest is None else self._newest.step

    def mark(self, kind: str, step: int) -> None:
        """Mark a step as an ``alarm`` or an ``intervention``."""
        if step not in self._marks[kind][-1:]:
            self._marks[kind].append(step)

    def draw(self) -> list[Picture]:
        """Return the pictures of the newest reading; none where they would be the last ones."""
        reading, state = self._newest, (self._readings, sum(map(len, self._marks.values())))
        if reading is None or state == self._drawn_at:
            return []
        names = self._shown(reading)
        groups = {name: [name] for name in names} if self._each_signal else {EVERY_HEAD: names}
        self._check_libraries()
        started = time.monotonic()
        drawn = [
            Picture(name, image, _caption(reading, group))
            for name, group in groups.items()
            if not self._blind and (image := self._image(reading, group)) is not None
        ]
        self._drawn_at = state
        self._next = time.monotonic() + (time.monotonic() - started) / _SHARE_OF_TIME
        return drawn

    def _shown(self, reading: Reading) -> list[str]:
        measured = signal_names(reading)
        if self._each_signal:
            return measured
        chosen = [
            next((name for name in group if name in measured), None) for group in _FIRST_CHOICE
        ]
        return [name for name in chosen if name is not None] or measured[:1]

    def _image(self, reading: Reading, names: list[str]) -> np.ndarray | None:
        """Draw some signals one below the other; None where there is nothing to draw."""
        names = [name for name in names if head_matrix(reading, name).size]
        if not names:
            return None
        if not self._plain:
            try:
                layers = list(reading.layers)
                signals = [self._history(name, layers) for name in names]
                return pixels(head_history(signals, layers))
            except Exception as error:  # the newest matrix is worth more than none
                self._draw_less("it has no axes and no history", f"{type(error).__name__}: {error}")
        matrix = head_matrix(reading, names[0])
        return head_image(matrix, *colour_range(names[0], matrix))

    def _check_libraries(self) -> None:
        """Find out what can be drawn, the first time."""
        if self._is_checked:
            return
        self._is_checked = True
        for package, name, less in (
            ("PIL", "pillow", "there is none"),  # first: matplotlib needs it too
            ("matplotlib.figure", "matplotlib", "it has no axes and no history"),
        ):
            try:
                importlib.import_module(package)
            except ImportError:
                self._draw_less(less, f"{name} is missing: pip install {name}")
                self._blind = package == "PIL"
                return

    def _draw_less(self, less: str, why: str) -> None:
        self._plain = True
        logger.warning(
            "stabmon cannot draw its picture of every head as planned: %s (%s)", less, why
        )

    def _history(self, name: str, layers: list[str]) -> HeadHistory:
        """Return one signal of all readings with a value of it."""
        past = [(step, kept) for step, kept in self._past if any(name in s for s in kept.values())]
        heads = max(
            signals[name].size for _, kept in past for signals in kept.values() if name in signals
        )
        values = np.full((len(past), len(layers), heads), np.nan, dtype=np.float32)
        for at, (_, kept) in enumerate(past):
            for row, layer in enumerate(layers):
                if name in kept.get(layer, {}):
                    values[at, row, : kept[layer][name].size] = kept[layer][name]
        scale = self._scale(name, values)
        grows = scale == self._scales.get(name)
        unit = presentation_of(name).unit
        return HeadHistory(
            name=_in_words(name),
            unit=f"{unit} ({'scale only widens' if grows else 'fixed scale'})",
            steps=[step for step, _ in past],
            values=values,
            scale=scale,
            hint=_HINTS.get(name, ""),
            marks=self._marks,
        )

    def _scale(self, name: str, values: np.ndarray) -> Scale:
        """Return the scale of a signal: fixed for shares and scores, else it only widens."""
        shown = presentation_of(name)
        low, high = shown.limits
        if low is not None and high is not None:
            return Scale(low, high)
        if shown.unit == "score":
            return _SCORES
        finite = values[np.isfinite(values)]
        known = self._scales.get(name, Scale(0.0, 0.0))
        self._scales[name] = Scale(
            min(known.low, -_rounded_up(-float(finite.min(initial=0.0)))),
            max(known.high, _rounded_up(float(finite.max(initial=0.0))), 1e-6),
        )
        return self._scales[name]


def _rounded_up(value: float) -> float:
    """Return the smallest of 1, 2, 5, 10, 20 … times a power of ten that is at least ``value``.

    >>> [_rounded_up(value) for value in (0.0, 0.03, 7.0, 12.0)]
    [0.0, 0.05, 10.0, 20.0]
    """
    if value <= 0:
        return 0.0
    power = 10.0 ** np.floor(np.log10(value))
    return float(next(step * power for step in (1, 2, 5, 10) if step * power >= value))


def _caption(reading: Reading, names: list[str]) -> str:
    """Return the step, and the values of each signal."""
    parts = []
    for name in names:
        matrix = head_matrix(reading, name)
        finite = matrix[np.isfinite(matrix)]
        if finite.size:
            parts.append(f"{name} {finite.min():.4g} (dark) to {finite.max():.4g} (bright)")
    return f"step {reading.step}: {'; '.join(parts) or 'no finite value'}"


def _in_words(name: str) -> str:
    """Return a signal's name as a title.

    >>> _in_words("hnf_log_curvature")
    'HNF log curvature'
    """
    words = name.replace("_", " ").replace("hnf", "HNF")
    return words[:1].upper() + words[1:]
