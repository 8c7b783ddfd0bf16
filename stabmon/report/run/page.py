"""Write the page of one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from stabmon._storage.atomic_write import replace_whole
from stabmon.report.page import Table
from stabmon.report.run.charts import NARROW, WIDE
from stabmon.report.run.curves import (
    Chart,
    comparison_chart,
    controller_chart,
    curvature_chart,
    precision_chart,
)
from stabmon.report.run.facts import differences, facts_of, settings_of
from stabmon.report.run.forecasts import outcomes
from stabmon.report.run.loading import Run
from stabmon.report.run.packing import packed
from stabmon.report.run.region import CheckSummary, check_summary
from stabmon.report.run.tables import (
    forecast_table,
    incident_table,
    intervention_table,
    issue_table,
    layer_table,
)
from stabmon.report.run.timeline import Axes, shared_axes, timeline
from stabmon.report.run.verdict import Verdict, verdict_of

PAGE = "report.html"
"""Name of a page in the folder of its records."""


@dataclass(frozen=True, eq=False)
class RunPart:
    """Parts of the page on one run."""

    run: Run
    verdict: Verdict
    facts: Sequence[tuple[str, str]]
    settings: Sequence[tuple[str, str]]
    timeline: Markup
    tables: Sequence[Table]
    check: CheckSummary | None


def run_page(runs: Sequence[Run]) -> str:
    """Render the page of runs as one HTML file.

    Args:
        runs: one or more, of :func:`~stabmon.report.run.loading.load_runs`.

    Returns:
        The file's text, without requests to anywhere.
    """
    from stabmon import __version__

    axes = shared_axes(runs)
    parts = [_part(run, axes) for run in runs]
    verdicts = [part.verdict for part in parts]
    data = packed(runs)
    charts: list[Chart | None] = [
        comparison_chart(runs, axes.span),
        controller_chart(runs, axes.span),
        curvature_chart(runs, axes.span),
        precision_chart(runs, axes.span),
    ]
    names = ", ".join(run.name for run in runs)
    text: str = _template().render(
        title=f"{names}: {verdicts[0].headline}" if len(runs) == 1 else f"Runs compared: {names}",
        parts=parts,
        several=len(runs) > 1,
        differences=_differences(runs, verdicts),
        charts=[chart for chart in charts if chart is not None],
        packed=data if any(run.signals.heads for run in runs) else None,
        widths=(NARROW, WIDE),
        version=__version__,
    )
    return text.encode("utf-8", "replace").decode()


def write_page(runs: Sequence[Run], out: Path) -> Path:
    """Write the page of runs, whole or not at all.

    Args:
        runs: one or more.
        out: the file to write.

    Returns:
        The file.

    Raises:
        OSError: if it cannot be written.
    """
    text = run_page(runs)

    def write(fresh: Path) -> None:
        fresh.write_text(text, encoding="utf-8")

    replace_whole(out, write)
    return out


def _part(run: Run, axes: Axes) -> RunPart:
    found = outcomes(run)
    tables = [
        incident_table(run),
        forecast_table(found),
        intervention_table(run),
        issue_table(run),
        layer_table(run),
    ]
    return RunPart(
        run=run,
        verdict=verdict_of(run),
        facts=facts_of(run),
        settings=settings_of(run),
        timeline=timeline(run, axes, found),
        tables=[table for table in tables if table.rows],
        check=check_summary(run.check),
    )


def _differences(runs: Sequence[Run], verdicts: Sequence[Verdict]) -> Table | None:
    if len(runs) < 2:
        return None
    rows = differences(runs, verdicts)
    head = ("", *(f"{run.letter} {run.name}" for run in runs))
    return Table(
        "Outcome, model, settings and versions that differ; all others are equal.", head, rows
    )


@cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("stabmon.report"), autoescape=True, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # signals keep their order
    return environment.get_template("run.html.j2")
