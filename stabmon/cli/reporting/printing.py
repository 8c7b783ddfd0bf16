"""Verdicts on runs on standard output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from stabmon._storage.strict_json import dumps
from stabmon.report.run.loading import Run
from stabmon.report.run.verdict import Verdict, verdict_of

STYLES = {"healthy": "green", "look": "yellow", "recovered": "yellow", "empty": "bold"}
"""Style of a headline by level; others are alarms."""


def print_verdicts(runs: Sequence[Run], out: Path, as_json: bool) -> None:
    """Print the verdict on each run and the page, or one JSON object.

    Args:
        runs: the runs of the page.
        out: the page.
        as_json: print one JSON object instead of text.
    """
    verdicts = [verdict_of(run) for run in runs]
    if as_json:
        objects = [_plain(run, each) for run, each in zip(runs, verdicts, strict=True)]
        print(dumps({"schema_version": 1, "page": str(out), "runs": objects}))
        return
    console = Console(highlight=False)
    for run, verdict in zip(runs, verdicts, strict=True):
        style = STYLES.get(verdict.level, "bold red")
        console.print(
            Text(run.name, style="bold"), Text(verdict.sign, style=style), Text(verdict.headline)
        )
        for sentence in verdict.details:
            console.print(Text(sentence))
        if verdict.advice:
            console.print(Text.assemble(("Next: ", "bold"), verdict.advice))
        if verdict.code:
            console.print(Text(verdict.code), soft_wrap=True)
        console.print(Text(f"{verdict.state} {verdict.looked_at}", style="dim"))
        if verdict.missing:
            console.print(Text(f"Not covered: {'; '.join(verdict.missing)}.", style="dim"))
    console.print(Text(f"page: {out}"), soft_wrap=True)


def _plain(run: Run, verdict: Verdict) -> dict[str, Any]:
    return {
        "run": run.name,
        "folder": str(run.folder),
        "number": run.number,
        "state": run.state,
        "last_step": run.last_step,
        "samples": len(run.signals.steps),
        "verdict": verdict.to_dict(),
        "incidents": [
            {
                "number": each.number,
                "cause": each.cause,
                "state": "open" if run.is_open(each) else "closed",
                "severity": each.severity,
                "first_step": each.first_step,
                "step": each.step,
                "headline": each.headline,
                "text": each.text(),
                "advice": each.advice,
                "code": each.code,
                "layers": list(each.layers),
                "heads": each.heads,
            }
            for each in run.incidents
        ],
        "interventions": [dict(each) for each in run.records.interventions],
    }
