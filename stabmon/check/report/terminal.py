"""A report in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from stabmon.check.judging.findings import Finding
from stabmon.check.region.region import OperatingPoint, stability_region
from stabmon.check.region.view import region_table
from stabmon.check.report.markdown import head_columns, head_rows, number
from stabmon.check.report.report import StabilityReport
from stabmon.check.report.words import sentences
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


def show(report: StabilityReport, console: Console) -> None:
    """Print sentences, findings with their code, and tables.

    Lines of code are neither indented nor broken, so that they can be copied.

    Args:
        report: the results.
        console: the console to print to.
    """
    first, *others = sentences(report)
    console.print(Text.assemble((report.verdict, f"bold {COLOURS[report.verdict]}"), f"  {first}"))
    for sentence in others:
        console.print(Text(sentence))
    for finding in report.findings:
        _show_finding(finding, console)
    for part in _tables(report):
        console.print(Text(""))
        console.print(part)
    for note in report.notes:
        console.print(Text(f"note: {note}", style="dim"))


def _show_finding(finding: Finding, console: Console) -> None:
    severity = (finding.severity, f"bold {COLOURS[finding.severity]}")
    console.print(Text(""))
    console.print(Text.assemble(severity, f"  {finding.name} in {finding.where} ({finding.basis})"))
    console.print(Padding(Text(f"{finding.text}."), (0, 0, 0, 2)))
    if (advice := finding.recommendation) is not None:
        for label, said in (("do", advice.what), ("then", advice.effect), ("from", advice.source)):
            console.print(Padding(Text.assemble((f"{label:<5}", "dim"), said), (0, 0, 0, 2)))
        console.print(Padding(Text("code", style="dim"), (0, 0, 0, 2)))
        console.print(Text(advice.code), soft_wrap=True)


def _tables(report: StabilityReport) -> Iterator[Any]:
    if report.views:
        yield _formats(report)
        yield _heads(report)
    if "region" in report.extra:
        origin = OperatingPoint.of(report.views)
        yield region_table(origin, stability_region(origin, report.config), report.config.dtype)
    if "sweep" in report.extra:
        yield sweep_table(report.extra["sweep"])


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
