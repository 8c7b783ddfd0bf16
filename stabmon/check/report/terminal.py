"""A report in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from stabmon.check.region.region import OperatingPoint, stability_region
from stabmon.check.region.view import region_table
from stabmon.check.report.markdown import head_columns, head_rows, number
from stabmon.check.report.report import StabilityReport
from stabmon.check.sweep.view import sweep_table

COLOURS = {
    "pass": "green",
    "warn": "yellow",
    "fail": "red",
    "info": "dim",
    "warning": "yellow",
    "error": "red",
    "critical": "red",
}
MOST_HEADS = 6


def view(report: StabilityReport) -> Group:
    """Render verdict, findings, formats and the worst heads."""
    return Group(*_parts(report))


def _parts(report: StabilityReport) -> Iterator[Any]:
    yield Text.assemble((report.verdict, f"bold {COLOURS[report.verdict]}"), f"  {report.subject}")
    basis = (
        "analytic: weights as the config draws them"
        if report.analytic
        else "measured on the model's own weights"
    )
    yield Text(f"{report.length} tokens, {report.config.dtype}, {basis}", style="dim")
    for each in report.findings:
        yield Text("")
        yield Text.assemble(
            (each.severity, f"bold {COLOURS[each.severity]}"),
            f"  {each.name}  {each.where}  ({each.basis})",
        )
        yield Padding(Text(each.text), (0, 0, 0, 2))
        if (advice := each.recommendation) is not None:
            for label, said in (
                ("do", advice.what),
                ("as", advice.code),
                ("then", advice.effect),
                ("from", advice.source),
            ):
                yield Padding(Text.assemble((f"{label:<5}", "dim"), said), (0, 0, 0, 2))
    if report.views:
        yield Text("")
        yield _formats(report)
        yield Text("")
        yield _heads(report)
    if "region" in report.extra:
        origin = OperatingPoint.of(report.views)
        yield Text("")
        yield region_table(origin, stability_region(origin, report.config), report.config.dtype)
    if "sweep" in report.extra:
        yield Text("")
        yield sweep_table(report.extra["sweep"])
    for note in report.notes:
        yield Text(f"note: {note}", style="dim")


def _formats(report: StabilityReport) -> Table:
    table = Table(title="number formats", title_justify="left", box=None, padding=(0, 1))
    for name in (
        "path",
        "format",
        "enough",
        "bits needed",
        "kept",
        "moves",
        "allowed",
        "q·k may grow",
    ):
        table.add_column(name, justify="left" if name in ("path", "format", "enough") else "right")
    for fit in report.precision:
        room = "" if fit.headroom == float("inf") else f"{fit.headroom:.3g}x"
        enough = Text("yes", style="green") if fit.safe else Text("no", style="red")
        path = f"{fit.path}{' *' if fit.used else ''}"
        bits = (number(fit.bits_needed), str(fit.bits_kept))
        table.add_row(
            path, fit.dtype, enough, *bits, f"{fit.moved:.2%}", f"{fit.allowed:.2%}", room
        )
    table.caption, table.caption_justify = "* the path that the model takes", "left"
    return table


def _heads(report: StabilityReport) -> Table:
    layer, *columns = head_columns(report)
    table = Table(
        title=f"the worst of {len(report.heads())} heads, {layer}",
        title_justify="left",
        box=None,
        padding=(0, 1),
    )
    table.add_column("", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in head_rows(report, MOST_HEADS):
        table.add_row(*row)
    return table
