"""A report as a page of Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from textwrap import indent

from stabmon.check.report.results import CheckResults
from stabmon.check.report.words import sentences
from stabmon.check.sweep.view import sweep_sentence
from stabmon.figures.labels import short_names

MOST_HEADS = 12


def to_markdown(report: CheckResults) -> str:
    """Render verdict, findings with advice, formats and the worst heads."""
    parts = [
        f"# Stability check: {report.verdict}",
        *(f"{sentence[0].upper()}{sentence[1:]}" for sentence in sentences(report)),
        *_findings(report),
    ]
    if report.views:
        parts += [
            "## Number formats",
            _table(
                (
                    "path",
                    "format",
                    "enough",
                    "bits needed",
                    "bits kept",
                    "probability moved",
                    "allowed",
                    "head-room of q·k",
                ),
                [
                    (
                        f"{fit.path}{' (used)' if fit.used else ''}",
                        fit.dtype,
                        "yes" if fit.safe else "no",
                        number(fit.bits_needed),
                        str(fit.bits_kept),
                        f"{fit.moved:.2%}",
                        f"{fit.allowed:.2%}",
                        "" if math.isinf(fit.headroom) else f"{fit.headroom:.3g}x",
                    )
                    for fit in report.precision
                ],
            ),
            f"## Heads, the worst {min(MOST_HEADS, len(report.heads()))} of {len(report.heads())}",
            _table(head_columns(report), head_rows(report, MOST_HEADS)),
        ]
    if "sweep" in report.extra:
        sweep = report.extra["sweep"]
        rows = [tuple(f"{value:.3g}" for value in run.values()) for run in sweep["runs"]]
        parts += [
            "## Learning rates",
            f"{sweep_sentence(sweep)}.",
            _table(("rate", "largest score", "saturated rows", "loss"), rows),
        ]
    if report.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in report.notes)]
    return "\n\n".join(parts) + "\n"


def head_columns(report: CheckResults) -> tuple[str, ...]:
    """Return the column names of :func:`head_rows`."""
    pattern = _short(report)[1]
    dtype = report.config.dtype if report.config.dtype != "fp32" else "bf16"
    return (f"layer {pattern}".strip(), *HEAD_COLUMNS, f"{dtype} moves")


HEAD_COLUMNS = ("head", "spread", "expected", "max", "H/ln n", "saturated", "bits")
"""Names of the columns of the table of heads.

``spread`` is the standard deviation of a row's scores, measured and expected; ``max`` the largest
score; H the entropy.
"""


def head_rows(report: CheckResults, most: int) -> list[tuple[str, ...]]:
    """Return the worst heads as rows of text.

    The last column is for the format to train in.

    Args:
        report: the results.
        most: number of heads.
    """
    dtype = report.config.dtype if report.config.dtype != "fp32" else "bf16"
    short = _short(report)[0]
    return [
        (
            short[row["layer"]],
            str(row["head"]),
            *(
                number(row[name])
                for name in (
                    "score_spread",
                    "expected_score_std",
                    "max_logit",
                    "normalized_entropy",
                )
            ),
            f"{row['saturated_fraction']:.0%}",
            number(row["precision_bits"]),
            f"{row[f'moved_by_{dtype}']:.2%}",
        )
        for row in report.heads(most)
    ]


def _short(report: CheckResults) -> tuple[dict[str, str], str]:
    """Return each layer's short name, and the pattern to complete with it.

    A lone layer's name is the pattern itself.
    """
    layers = [each.layer for each in report.views]
    if len(layers) == 1:
        return {layers[0]: ""}, layers[0]
    names, pattern = short_names(layers)
    return dict(zip(layers, names, strict=True)), pattern


def number(value: float) -> str:
    """Format three digits, or a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.3g}"


def _findings(report: CheckResults) -> Iterable[str]:
    if not report.findings:
        return
    yield "## Findings"
    for place, each in enumerate(report.findings, start=1):
        lines = [
            f"{place}. **{each.severity}: {each.name}**, {each.where} ({each.basis}): {each.text}."
        ]
        advice = each.recommendation
        if advice is not None:
            lines += [
                f"   - do: {advice.what} ({advice.where})",
                f"   - then: {advice.effect}",
                f"   - from: {advice.source}",
                f"   - code:\n\n     ```python\n{indent(advice.code, ' ' * 5)}\n     ```",
            ]
        yield "\n".join(lines)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
