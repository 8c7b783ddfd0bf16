"""The page of each kind of record."""

from __future__ import annotations

from collections.abc import Callable

from stabmon.analysis.record import AnalysisRecord
from stabmon.report.cake import cake_page
from stabmon.report.evolution import evolution_page
from stabmon.report.heatmap import heatmap_page
from stabmon.report.page import Page
from stabmon.report.patterns import patterns_page
from stabmon.report.rollout import rollout_page

PAGES: dict[str, Callable[[AnalysisRecord], Page]] = {
    "rollout": rollout_page,
    "patterns": patterns_page,
    "cake": cake_page,
    "heatmap": heatmap_page,
    "evolution": evolution_page,
}


def page_of(record: AnalysisRecord) -> Page:
    """Draw up the page of a record.

    Args:
        record: of any kind in ``PAGES``.

    Returns:
        The page.

    Raises:
        ValueError: if the kind has no page, or the record lacks values or arrays of its page.
    """
    if record.kind not in PAGES:
        raise ValueError(f"unknown kind {record.kind!r}: use {', '.join(PAGES)}")
    try:
        return PAGES[record.kind](record)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"the {record.kind} record lacks what its page needs ({type(error).__name__}: "
            f"{error}); run the analysis again"
        ) from error
