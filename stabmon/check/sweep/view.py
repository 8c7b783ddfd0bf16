"""A sweep over learning rates in the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text


def sweep_table(sweep: Mapping[str, Any]) -> Table:
    """Draw a row per rate, and the conclusion; ``sweep`` is :meth:`Sweep.to_dict`."""
    table = Table(
        title=f"learning rates, {sweep['steps']} steps each",
        title_justify="left",
        box=None,
        padding=(0, 2),
    )
    for name in ("rate", "largest score", "saturated rows", "loss"):
        table.add_column(name, justify="right")
    for run in sweep["runs"]:
        style = "red" if run["largest_score"] >= sweep["score_limit"] else ""
        share = f"{run['saturated']:.0%}"
        table.add_row(
            f"{run['rate']:.3g}",
            f"{run['largest_score']:.3g}",
            share,
            f"{run['loss']:.3f}",
            style=style,
        )
    table.caption, table.caption_justify = Text(sweep_sentence(sweep)), "left"
    return table


def sweep_sentence(sweep: Mapping[str, Any]) -> str:
    """Return the conclusion in one sentence."""
    if sweep["limit"] is None:
        return (
            f"at no rate that was tried do scores reach {sweep['score_limit']:.3g}, where rows "
            "stop learning"
        )
    words = f"expected to diverge from a rate of {sweep['limit']:.2g} on"
    if sweep["low"] is not None and sweep["high"] is not None:
        words += f" (90 %: {sweep['low']:.2g} to {sweep['high']:.2g})"
    if sweep["exponent"] is not None:
        words += f", scores growing as rate^{sweep['exponent']:.1f}"
    if sweep["width"] != sweep["full_width"]:
        words += (
            f"; at the full width of {sweep['full_width']}, by 1 / width, "
            f"from {sweep['full_limit']:.2g} on"
        )
    return words
