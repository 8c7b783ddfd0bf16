"""Results of an analysis on standard output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from stabmon._storage.strict_json import dumps
from stabmon.analysis.record import AnalysisRecord
from stabmon.report.page import Page
from stabmon.report.rollout import terminal_overlay

Result = tuple[AnalysisRecord, Page, list[str]]
"""Record, page and names of the written files, the page first."""
STYLES = {"error": "bold red", "warning": "bold yellow"}


def print_results(results: Sequence[Result], folder: str, as_json: bool) -> None:
    """Print verdicts, findings and files, or one JSON object.

    Args:
        results: one per record.
        folder: where the files were written.
        as_json: print one JSON object instead of text.
    """
    if as_json:
        objects = [_summary(*result, folder) for result in results]
        several = {"schema_version": 1, "analyses": objects}
        print(dumps(objects[0] if len(objects) == 1 else several))
        return
    console = Console(highlight=False)
    for record, page, files in results:
        console.print(Text(page.title, style="bold"))
        for paragraph in page.verdict:
            console.print(Text(paragraph))
        overlay = terminal_overlay(record) if record.kind == "rollout" else None
        if overlay is not None:
            console.print(Text("what is owed to each token, 9 the most:", style="dim"))
            console.print(overlay)
        for finding in page.findings:
            style = STYLES.get(finding.severity, "bold")
            console.print(Text.assemble((finding.severity, style), f"  {finding.text}"))
        for note in page.notes:
            console.print(Text(f"note: {note}", style="dim"))
        console.print(Text(f"{Path(folder) / files[0]} and {len(files) - 1} files beside it"))


def _summary(record: AnalysisRecord, page: Page, files: list[str], folder: str) -> dict[str, Any]:
    values = record.values
    return {
        "schema_version": 1,
        "kind": record.kind,
        "model": values.get("model"),
        "input": values.get("input"),
        "samples": values.get("samples"),
        "verdict": list(page.verdict),
        "findings": [vars(finding) for finding in page.findings],
        "notes": list(page.notes),
        "numbers": dict(page.numbers),
        "seconds": values.get("seconds"),
        "out": str(folder),
        "files": list(files),
    }
