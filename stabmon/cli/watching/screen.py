"""The screen of ``stabmon watch``, laid out to any size: issues first, layers below."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property

import numpy as np
from rich.text import Text

from stabmon._display.bars import bars, resampled
from stabmon.cli.watching.head_map import HeadMap, mark
from stabmon.cli.watching.incident_lines import full, headline
from stabmon.cli.watching.words import LOWEST, age, cut, in_words, number, printable, wrapped
from stabmon.figures.labels import short_names
from stabmon.incidents import Incident, intervention_text
from stabmon.records import SEVERITIES, StabilityIssue, counted
from stabmon.signals.presentation import presentation_of
from stabmon.sinks.delivery.gaps import in_words as gaps_in_words
from stabmon.sinks.scalars import dashboard_scalars
from stabmon.sinks.stored.run_tail import RunState

SIGNALS = (
    "normalized_entropy",
    "max_logit",
    "max_probability",
    "hnf_log_curvature",
    "precision_bits",
)
"""Signals that the map can show, in the order of the key ``s``."""
QUIET_AFTER = 60.0
"""Seconds without a reading after which the title says so."""


@dataclass(frozen=True)
class Chosen:
    """The user's present choice of what is shown."""

    layer: int | None = None
    """Place of the layer among those shown; None before the first key."""
    incident: int = 0
    """Place among the open incidents."""
    signal: int = 0
    """Place in :data:`SIGNALS`."""
    filter: str = ""
    """Part of the names of the layers shown; empty for all."""
    footer: str = ""
    """The last line; empty for none."""


@dataclass(frozen=True)
class Screen:
    """A run as lines of text.

    Args:
        state: the run.
        chosen: the layer, incident and signal to show.
        now: the present time in seconds since 1970.
    """

    state: RunState
    chosen: Chosen = Chosen()
    now: float = field(default_factory=time.time)

    @property
    def layers(self) -> list[str]:
        """The layers shown, in the model's order."""
        reading = self.state.reading
        wanted = self.chosen.filter.casefold()
        return [] if reading is None else [n for n in reading.layers if wanted in n.casefold()]

    @property
    def signal(self) -> str:
        """The signal that the map shows."""
        reading = self.state.reading
        measured = {name for each in reading.layers.values() for name in each} if reading else set()
        known = [name for name in SIGNALS if name in measured] or sorted(measured)
        return known[self.chosen.signal % len(known)] if known else SIGNALS[0]

    def lines(self, width: int = 80, height: int | None = None) -> list[Text]:
        """Return the screen, each line at most ``width`` cells.

        Args:
            width: in cells.
            height: largest number of lines; None for all there is to say.
        """
        top = [self.title(width), *self._trouble(width), *self._loss(width)]
        footer = [Text(self.chosen.footer, "dim")] if self.chosen.footer else []
        room = math.inf if height is None else height - len(top) - len(footer)
        done = self._interventions(width, 3 if room >= 20 else 2)
        if height is None:
            issues, layers = self._issues(width, None), self._map(width, None)
            return [*top, *issues, *layers, *self._table(), *done, *footer]
        half = (int(room) - len(done)) // 2
        heads = self._heads
        least = min(heads.whole_height(width) + 2 if heads.names else 1, max(half, 5))
        issues = self._issues(width, max(2, int(room) - len(done) - least))
        layers_shown = self._map(width, int(room) - len(done) - len(issues))
        spare = int(room) - len(done) - len(issues) - len(layers_shown)
        gaps = [[Text()] if spare > 2 else [] for _ in range(2)]
        shown = [*top, *gaps[0], *issues, *gaps[1], *layers_shown, *done][: height - len(footer)]
        shown += [Text()] * (height - len(footer) - len(shown))
        return [cut(line, width) for line in [*shown, *footer]]

    # -- the parts

    def title(self, width: int) -> Text:
        """Return the first line: run, step, loss, and the age of the last reading."""
        state, reading = self.state, self.state.reading
        line = Text(f" (run {state.run} in this folder)" if state.run > 1 else "")
        if reading is None:
            first = state.meta.get("sampling", {}).get("first")
            when = f", due at step {first}" if first else ""
            line.append(f" · no reading yet{when}" if state.run else " · waiting")
        else:
            loss = "unknown" if reading.loss is None else number(reading.loss)
            line.append(f" · step {reading.step} · loss {loss} · ")
            quiet = 0.0 if state.last_line is None else self.now - state.last_line
            if (ended := _time(state.meta.get("ended"))) is not None:
                line.append(f"ended {age(self.now - ended)} ago")
            elif quiet < QUIET_AFTER:
                line.append(f"last reading {age(quiet)} ago")
            else:
                line.append(f"no line for {age(quiet)}", "bold magenta")
        run = state.folder.parent.name if state.folder.name == "stabmon" else state.folder.name
        name = Text.assemble(("stabmon", "bold"), f" {printable(run) or '.'}")
        name.truncate(max(10, width - len(line)), overflow="ellipsis")
        return name + line

    def _trouble(self, width: int) -> list[Text]:
        if not self.state.trouble:
            gaps = gaps_in_words(self.state.gaps)
            return wrapped(f"missing from the records: {gaps}", width, "dim")[:2] if gaps else []
        text = f"cannot be read now, trying again: {self.state.trouble}"
        return wrapped(text, width, "bold magenta")[:2]

    def _loss(self, width: int) -> list[Text]:
        points = [point for point in self.state.points if point.loss is not None]
        if not points:
            return []
        losses = np.array([point.loss for point in points])
        ends = (
            f" {number(losses[0])} → {number(losses[-1])}, steps {points[0].step}-{points[-1].step}"
        )
        room = max(8, width - len("loss ") - len(ends))
        return [Text(f"loss {bars(resampled(losses, room))}{ends}")] if len(points) > 1 else []

    def _issues(self, width: int, height: int | None) -> list[Text]:
        """Return open incidents, the chosen one in full, then closed ones, in ``height`` lines."""
        opened, room = list(self.state.open_incidents), math.inf if height is None else height
        closed = [each for each in self.state.incidents if each.state == "closed"]
        lines = [_rule(self._count_text(opened, closed), width)]
        if not opened and self.state.reading is None:
            return lines[: height or 1] if self.state.incidents else []
        chosen = self.chosen.incident % len(opened) if opened else 0
        others = max(0, len(opened) - 1)
        detail = full(opened[chosen], width, room - 1 - min(others, 3)) if opened else []
        for place, each in enumerate(opened):
            left = room - len(lines) - (0 if place > chosen else len(detail))
            if place == chosen:
                lines += detail
            elif left >= 1 and len(lines) < room:
                last = left <= 1 and place < len(opened) - 1
                more = Text(f"  and {len(opened) - place} more: n") if last else None
                lines.append(more or headline(each, width))
                if last and place > chosen:
                    break
        for each in reversed(closed[-3:]):
            if len(lines) < room:
                lines.append(
                    Text(f"  closed   {printable(each.headline)}, step {each.step}", "dim")
                )
        return lines[: None if height is None else height]

    def _count_text(self, opened: Sequence[Incident], closed: Sequence[Incident]) -> str:
        alarms = sum(each.severity in ("error", "critical") for each in opened)
        more = f"; {len(closed)} closed" if closed else ""
        if len(opened) == 1:
            return f"1 open incident{', an alarm' if alarms else ''}{more}"
        if opened:
            return f"{len(opened)} open incidents, {alarms} of them alarms{more}"
        if closed or self.state.reading is None:
            return f"no open incident{more}"
        return f"no incident up to step {self.state.reading.step}"

    @cached_property
    def _heads(self) -> HeadMap:
        reading, signal = self.state.reading, self.signal
        if reading is None:
            return HeadMap([], [], [])
        short = dict(zip(reading.layers, short_names(list(reading.layers))[0], strict=True))
        return HeadMap(
            names=[printable(short[name]) for name in self.layers],
            values=[np.asarray(reading.layers[name].get(signal, ())) for name in self.layers],
            issues=self._worst(self.layers),
            limits=presentation_of(signal).limits,
            lowest=signal in LOWEST,
        )

    def _map(self, width: int, height: int | None) -> list[Text]:
        """Return the map of layers and heads under a line on its meaning."""
        if self.state.reading is None:
            return []
        heads = self._heads
        if not heads.names:
            wanted = f" matches {self.chosen.filter!r}" if self.chosen.filter else " was measured"
            return [_rule(f"no layer{wanted}", width)][:height]
        letters = self._letters(heads.issues)
        room = heads.whole_height(width) if height is None else height - 1 - len(letters)
        low, high = map(number, heads.range)
        meaning = {"normalized_entropy": "▁ one key, ▇ all keys alike"}.get(
            self.signal, f"▁ {low}, ▇ {high} {presentation_of(self.signal).unit}"
        )
        title = f"{counted(len(heads.names), 'layer')} × heads: {in_words(self.signal)} ({meaning})"
        if (fits := heads.heads_per_character(width, room)) > 1:
            title += f", {fits} heads per sign"
        lines = heads.lines(width, room, self.chosen.layer)
        return [_rule(title, width), *lines, *letters][:height]

    def _table(self) -> list[Text]:
        """Return the layers' full names and signals, for text that is searched."""
        reading = self.state.reading
        if reading is None or not self.layers:
            return []
        known = [name for name in SIGNALS if any(name in each for each in reading.layers.values())]
        label = max(map(len, self.layers))
        heads = "".join(f"  {in_words(name):>17}" for name in known)
        lines = [Text(f"{'layer':<{label}}{heads}")]
        scalars = dashboard_scalars(reading, (), alarms=0)
        for layer in self.layers:
            values = [scalars.get(f"attention_layers/{layer}/{name}") for name in known]
            shown = "".join(f"  {'–' if v is None else number(v):>17}" for v in values)
            lines.append(Text(f"{printable(layer):<{label}}{shown}"))
        return lines

    def _letters(self, issues: Sequence[Mapping[int | None, StabilityIssue]]) -> list[Text]:
        """Return a line on the letters in the map, where there are any."""
        words = {
            mark(each)[0].upper(): each.issue_type.replace("_", " ")
            for found in issues
            for each in found.values()
        }
        key = ", ".join(f"{letter} {meaning}" for letter, meaning in sorted(words.items()))
        return [Text(f"open issues: {key} (small letter: no alarm)", "dim")] if key else []

    def _worst(self, layers: Sequence[str]) -> list[dict[int | None, StabilityIssue]]:
        """Return the worst open issue by head, per layer; None for the whole layer."""
        found: dict[str | None, dict[int | None, StabilityIssue]] = {}
        worst_last = sorted(
            self.state.open_issues, key=lambda issue: SEVERITIES.index(issue.severity)
        )
        for issue in worst_last:
            found.setdefault(issue.layer, {})[issue.head] = issue
        return [found.get(layer, {}) for layer in layers]

    def _interventions(self, width: int, most: int) -> list[Text]:
        done = self.state.interventions
        if not done:
            return []
        lines = [_rule(counted(len(done), "intervention record"), width)]
        for record in done[-(most - 1) :]:
            text = f"step {record.get('step', '?')}: {intervention_text(record)}"
            lines.append(Text(f"  {printable(text)}"))
        return lines


def _time(text: object) -> float | None:
    """Return a stored time in seconds since 1970; None for what is none."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None


def _rule(text: str, width: int) -> Text:
    """Return a heading, in reverse over the whole width."""
    line = Text(f" {text}", "reverse")
    line.truncate(width, overflow="ellipsis", pad=True)
    return line
