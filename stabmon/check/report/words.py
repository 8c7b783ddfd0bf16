"""A report in sentences: the verdict, what was looked at, what is expected."""

from __future__ import annotations

import math
from collections.abc import Iterator

from stabmon.check.config import DTYPES
from stabmon.check.judging.findings import counts
from stabmon.check.report.results import CheckResults
from stabmon.figures.labels import short_names


def sentences(report: CheckResults) -> list[str]:
    """Return the verdict, the things looked at and the expectation, a sentence each.

    Args:
        report: the results.
    """
    return [verdict(report), looked_at(report), *_expected(report)]


def verdict(report: CheckResults) -> str:
    """Return the verdict as a sentence."""
    found = ", ".join(
        f"{count} {severity} finding{'s' if count > 1 else ''}"
        for severity, count in counts(report.findings).items()
    )
    stable = "is expected" if report.verdict != "fail" else "is not expected"
    return (
        f"attention of {report.subject} {stable} to be stable in training at {report.length} "
        f"tokens in {dtype_name(report.config.dtype)}: {found or 'no finding'}."
    )


def looked_at(report: CheckResults) -> str:
    """Return what the verdict rests on."""
    if not report.views:
        return "Looked at: the weights alone."
    heads = sum(view.info.heads for view in report.views)
    layers = [view.layer for view in report.views]
    place = layers[0] if len(layers) == 1 else short_names(layers)[1]
    weights = "weights as the config draws them" if report.analytic else "the model's own weights"
    sample = f" on {report.sample}" if report.sample else ""
    return (
        f"Looked at: {_count(heads, 'head')} in {_count(len(layers), 'layer')} ({place}), "
        f"{weights}, one forward and backward{sample}."
    )


def dtype_name(short: str) -> str:
    """Return torch's name of a precision.

    >>> dtype_name("bf16")
    'bfloat16'
    """
    return str(DTYPES[short]).removeprefix("torch.")


def _expected(report: CheckResults) -> Iterator[str]:
    if not report.views:
        return
    largest = [each for view in report.views if math.isfinite(each := view.expected_max)]
    entropy = [each for view in report.views if math.isfinite(each := view.expected_share)]
    enough = [dtype_name(each) for each in DTYPES if report.safe(each)]
    parts = [f"largest score about {max(largest):.2g}"] if largest else []
    parts += [f"rows with {min(entropy):.0%} of their possible entropy"] if entropy else []
    parts += [f"{' and '.join(enough)} precise enough" if enough else "no format precise enough"]
    yield f"Expected: {', '.join(parts)}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
