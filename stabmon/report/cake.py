"""The page of a simulated KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stabmon.analysis.record import AnalysisRecord
from stabmon.report.cake_numbers import losses_of, mean_costs, preserved_shares
from stabmon.report.cake_sections import (
    budget_section,
    decode_section,
    kept_section,
    perplexity_sections,
    preserved_section,
)
from stabmon.report.numbers import number, percent, short_layers
from stabmon.report.page import Finding, Page, Section, Table
from stabmon.report.words import common_facts, mean_of

WORSE = 0.01
"""Nats per token from which a difference of losses is a finding."""


def cake_page(record: AnalysisRecord) -> Page:
    """Draw up the page of a ``cake`` record.

    Args:
        record: of :meth:`stabmon.analysis.kv_cache.report.CakeReport.to_record`.

    Returns:
        The page.
    """
    values, arrays = record.values, record.arrays
    layers = list(values["layers"])
    names, meaning = short_layers(layers)
    findings = _findings(record)
    sections = [
        budget_section(record, names, meaning),
        preserved_section(record, names),
        kept_section(record, layers, names),
    ]
    if int(values["steps"]) > 0:
        sections.append(decode_section(record, layers, names))
    sections += perplexity_sections(record)
    if values.get("left_out"):
        rows = [(name, str(reason)) for name, reason in values["left_out"].items()]
        said = "These layers keep the cache that they have and count nowhere above."
        sections.append(Section("Layers left out", [said], [Table("", ("layer", "why"), rows)]))
    facts = [
        *common_facts(record),
        ("policy", str(values["policy"])),
        ("cache size", _size(values["cache_size"])),
        ("window", number(values["window_size"])),
        *((str(name), number(value)) for name, value in values["settings"].items()),
        ("prompt tokens", ", ".join(number(length) for length in values["lengths"][:8])),
    ]
    shown = (
        "compression_ratio",
        "eviction_frequency",
        "budget_use",
        "perplexity",
        "full_perplexity",
    )
    return Page(
        kind="cake",
        title=f"KV cache under {str(values['policy']).upper()}",
        subject=str(values.get("model", "")),
        verdict=_verdict(record, names),
        findings=findings,
        facts=facts,
        sections=sections,
        notes=[str(note) for note in values.get("notes", ())],
        numbers={
            **{name: values[name] for name in shown},
            "layers": {
                layer: {
                    name: float(mean_of(arrays[name][at]))
                    for name in ("dispersion", "shift", "preference", "budget")
                }
                for at, layer in enumerate(layers)
            },
            "preserved": preserved_shares(record),
            "perplexities": mean_costs(record),
        },
    )


def _size(size: float) -> str:
    return (
        f"{percent(size)} of the prompt"
        if isinstance(size, float) and 0 < size < 1
        else f"{number(size)} keys"
    )


def _verdict(record: AnalysisRecord, names: Sequence[str]) -> list[str]:
    values = record.values
    shares = preserved_shares(record)
    budgets = mean_of(record.arrays["budget"], 1)
    low, high = int(np.argmin(budgets)), int(np.argmax(budgets))
    policy = str(values["policy"])
    said = [
        f"{percent(values['compression_ratio'])} of the prompt's keys are kept, "
        f"{number(float(np.mean(values['sizes'])), 4)} a layer on average "
        f"of {number(float(np.mean(values['lengths'])), 4)}; budgets beside the window run from "
        f"{number(float(budgets[low]), 4)} keys (layer {names[low]}) "
        f"to {number(float(budgets[high]), 4)} (layer {names[high]})."
    ]
    if policy in shares and "mass" in shares[policy]:
        others = [
            f"{name.replace('_', ' ')} {percent(share['mass'])}"
            for name, share in shares.items()
            if name != policy and "mass" in share
        ]
        said.append(
            f"The kept keys hold {percent(shares[policy]['mass'])} of the attention of the "
            f"window's queries; with as many keys chosen otherwise: {', '.join(others)}."
        )
    small, full = _number(values.get("perplexity")), _number(values.get("full_perplexity"))
    if np.isfinite(small) and np.isfinite(full):
        lost = float(np.log(small / full))
        word = "more" if lost >= 0 else "less"
        said.append(
            f"Over the tokens that follow, perplexity is {number(small, 4)} with this cache and "
            f"{number(full, 4)} with the full one: "
            f"{number(abs(lost), 2)} nats a token {word}."
        )
    losses = losses_of(record)
    if losses and policy in losses[1]:
        sizes, table, whole = losses
        middle = len(sizes) // 2
        cost = {name: float((each - whole).mean(-1)[middle]) for name, each in table.items()}
        first = min(cost, key=cost.__getitem__)
        said.append(
            f"On text that really follows, at a cache of {number(sizes[middle], 4)} keys, "
            f"{policy} costs {number(cost[policy], 2)} nats a token against the full cache; "
            f"of {len(cost)} policies {first.replace('_', ' ')} costs least "
            f"({number(cost[first], 2)})."
        )
    said.append(
        f"Keys were evicted in {percent(values['eviction_frequency'])} of all layers and steps; "
        f"{percent(values['budget_use'])} of the allowed cache is used."
    )
    return said


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _findings(record: AnalysisRecord) -> list[Finding]:
    found = []
    bad = [
        name
        for name in ("dispersion", "shift", "preference")
        if not np.isfinite(record.arrays[name]).all()
    ]
    if bad:
        text = (
            f"{' and '.join(bad)} not finite: the model's attention is NaN or infinite, and "
            "the budgets mean nothing."
        )
        found.append(Finding("error", "non_finite", text))
    policy, shares = str(record.values["policy"]), preserved_shares(record)
    recent = next((share for name, share in shares.items() if name.startswith("recen")), None)
    if recent and policy in shares and shares[policy]["mass"] < recent["mass"]:
        found.append(
            Finding(
                "warning",
                "less_mass_than_recency",
                f"{policy} keeps less attention mass ({percent(shares[policy]['mass'])}) than "
                "keeping the newest keys does "
                f"({percent(recent['mass'])}): this model needs no selection at this size.",
            )
        )
    losses = losses_of(record)
    if losses:
        sizes, table, _ = losses
        rival = next((name for name in table if name.startswith("recen")), None)
        if policy in table and rival:
            gap = (table[policy] - table[rival]).mean(-1)
            worse = [number(size) for size, nats in zip(sizes, gap, strict=True) if nats > WORSE]
            if worse:
                text = (
                    f"{policy} costs more than {rival.replace('_', ' ')} at a cache of "
                    f"{', '.join(worse)} keys, by "
                    f"{number(float(gap.max()), 2)} nats a token at most: keep the newest keys "
                    "instead."
                )
                found.append(Finding("warning", "loses_to_recency", text))
    return found
