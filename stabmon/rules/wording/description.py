"""Description of issues with one cause, in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from stabmon.records import StabilityIssue, counted

RUN = "the run"
"""Location of issues without a layer."""


@dataclass(frozen=True)
class Description:
    """Words for the issues of one rule at one step.

    Example:
        >>> Description("attention scores run away", "largest score 95, was 12 at step 110").title
        'attention scores run away'
    """

    title: str
    """The finding as a clause, without step and location."""
    numbers: str
    """Named quantities, each with its past."""
    advice: str = ""
    """Advice to the user, in the terms of the framework."""
    code: str = ""
    """Lines of code that do it, ready to copy; empty where there is none."""


def in_order(layer: str) -> list[tuple[int, str]]:
    """Return the key that sorts layers by the numbers in their names.

    Example:
        >>> sorted(["h.10", "h.9"], key=in_order)
        ['h.9', 'h.10']
    """
    parts = re.split(r"(\d+)", layer)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def locate(issues: Sequence[StabilityIssue]) -> str:
    """Return the location of issues in words.

    Args:
        issues: at least one issue.

    Returns:
        ``the run``, one layer with its heads, or the first and last layer and the counts.

    Example:
        >>> issue = StabilityIssue(7, "h.0", 3, "logit_growth", "error", 80.0, 50.0, "")
        >>> locate([issue])
        'h.0 head 3'
    """
    layers = sorted({issue.layer for issue in issues if issue.layer is not None}, key=in_order)
    heads = {(issue.layer, issue.head) for issue in issues if issue.head is not None}
    if not layers:
        return RUN
    if len(layers) > 1:
        among = counted(len(layers), "layer") + (
            f", {counted(len(heads), 'head')}" if heads else ""
        )
        return f"{layers[0]} … {layers[-1]} ({among})"
    if not heads:
        return str(layers[0])
    numbers = sorted({head for _, head in heads if head is not None})
    shown = ", ".join(map(str, numbers[:8])) + (" …" if len(numbers) > 8 else "")
    return f"{layers[0]} head{'' if len(numbers) == 1 else 's'} {shown}"
