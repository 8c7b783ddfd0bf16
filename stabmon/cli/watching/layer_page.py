"""One layer of a run: its open issues, and each signal over the steps and over the heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich.text import Text

from stabmon._display.bars import bars, resampled
from stabmon.cli.watching.words import LOWEST, STYLES, in_words, number, printable
from stabmon.records import SEVERITIES, Reading, StabilityIssue
from stabmon.signals.presentation import presentation_of

History = Sequence[tuple[int, Mapping[str, np.ndarray]]]
"""Steps, and the layer's signals at each: ``[H]`` by name."""
_NAME, _NOW, _EXTREME = 24, 9, 16
"""Columns of the name, the present value, and the extreme head."""
_MOST_ISSUES = 6


def layer_lines(
    layer: str,
    reading: Reading,
    history: History,
    issues: Sequence[StabilityIssue],
    width: int,
    height: int,
) -> list[Text]:
    """Return the page of a layer in at most ``height`` lines.

    Args:
        layer: its name.
        reading: the newest reading.
        history: its signals at earlier steps, oldest first.
        issues: its open issues.
        width: in cells.
        height: in lines.
    """
    place = list(reading.layers).index(layer) + 1
    signals = reading.layers[layer]
    heads = max((np.size(each) for each in signals.values()), default=0)
    title = f"{printable(layer)}: layer {place} of {len(reading.layers)}, step {reading.step}"
    lines = [Text(title, "bold"), *_issues(issues)]
    span = f"{history[0][0]}-{history[-1][0]}" if history else f"{reading.step}"
    room = max(0, width - 1 - _NAME - _NOW - 2 - _EXTREME)
    across = min(heads, max(room // 2, room - 12))
    over = room - across
    steps = f"steps {span}"[:over]
    heading = f" {'':{_NAME}}{steps:<{over}}{'now':>{_NOW}}  heads 0 to {heads - 1}"
    lines.append(Text(heading.ljust(width)[:width], "reverse"))
    for name, values in signals.items():
        if len(lines) == height:
            break
        lines.append(_signal(name, np.asarray(values), history, over, across))
    return lines


def _issues(issues: Sequence[StabilityIssue]) -> list[Text]:
    if not issues:
        return [Text("no issue is open here", "green")]
    lines = []
    worst_first = sorted(issues, key=lambda each: -SEVERITIES.index(each.severity))
    for issue in worst_first[:_MOST_ISSUES]:
        where = "whole layer" if issue.head is None else f"head {issue.head}"
        text = f"{issue.issue_type.replace('_', ' ')}, {where}, since step {issue.step}"
        if (eta := issue.eta_steps) is not None:
            text += f", damage {'now' if eta < 1 else f'in about {eta:.0f} steps'}"
        lines.append(Text.assemble((f"{issue.severity:<8} ", STYLES[issue.severity]), text))
    if len(issues) > _MOST_ISSUES:
        lines.append(Text(f"and {len(issues) - _MOST_ISSUES} more"))
    return lines


def _signal(name: str, now: np.ndarray, history: History, over: int, across: int) -> Text:
    """Return one signal: over the steps, its present value, and every head."""
    shown = presentation_of(name)
    reduce = np.max if shown.reduction == "max" else np.mean
    past = np.array([reduce(each[name]) for _, each in history if np.size(each.get(name, ()))])
    line = Text(f" {in_words(name):{_NAME}.{_NAME - 1}}")
    line.append(
        bars(resampled(past, over - 1), shown.limits) if len(past) and over > 1 else "", "cyan"
    )
    line.append(" " * (_NAME + 1 + over - len(line)))
    value = number(float(reduce(now))) if now.size else "-"
    line.append(f"{value:>{_NOW}}  ")
    line.append(bars(resampled(now, across), shown.limits) if now.size and across else "", "cyan")
    if np.isfinite(now).any():
        extreme = int(np.nanargmin(now) if name in LOWEST else np.nanargmax(now))
        line.append(f" {number(float(now[extreme]))} at {extreme}")
    return line
