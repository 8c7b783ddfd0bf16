"""Numbers of a simulated KV cache that several parts of its page use."""

from __future__ import annotations

from typing import Any

import numpy as np

from stabmon.analysis.record import AnalysisRecord
from stabmon.report.words import mean_of


def preserved_shares(record: AnalysisRecord) -> dict[str, dict[str, float]]:
    """Return the mean share preserved by each choice, by measure."""
    preserved = record.arrays["preserved"]
    return {
        choice_name(record, choice): {
            measure: float(mean_of(preserved[:, at, place]))
            for place, measure in enumerate(record.values["measures"])
        }
        for at, choice in enumerate(record.values["choices"])
    }


def choice_name(record: AnalysisRecord, choice: str) -> str:
    """Return a choice's name; the policy's for its own, which the record calls ``kept``."""
    return str(record.values["policy"]) if choice == "kept" else choice


def losses_of(
    record: AnalysisRecord,
) -> tuple[list[float], dict[str, np.ndarray], np.ndarray] | None:
    """Return the losses of continued prompts, in nats per token.

    Args:
        record: of kind ``cake``.

    Returns:
        Cache sizes in keys; policy -> ``[sizes, prompts]``; the full cache's ``[prompts]``. None if
        no losses were measured.
    """
    if "perplexity_nats" not in record.arrays:
        return None
    values, nats = record.values, record.arrays["perplexity_nats"]
    context = float(values["perplexity_context"])
    sizes = [
        size if size >= 1 else size * context for size in map(float, values["perplexity_sizes"])
    ]
    table = dict(zip(values["perplexity_policies"], nats, strict=True))
    return sizes, table, record.arrays["perplexity_full_nats"]


def mean_costs(record: AnalysisRecord) -> dict[str, Any] | None:
    """Return the mean nats per token lost to the full cache, by policy and size."""
    losses = losses_of(record)
    if losses is None:
        return None
    sizes, table, full = losses
    return {
        "cache_sizes": sizes,
        "full": float(full.mean()),
        "cost": {name: (each - full).mean(-1).tolist() for name, each in table.items()},
    }
