"""The page of a simulated KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from stabmon.analysis.record import AnalysisRecord
from stabmon.figures import caches, kept_keys
from stabmon.report.page import Finding, Page, Picture, Section, Table
from stabmon.report.words import (
    by_layer,
    common_facts,
    mean_of,
    number,
    percent,
    plural,
    short_layers,
)

WORSE = 0.01
"""Nats a token from which a difference of losses is called one."""
MOST_POSITIONS = 1024
"""Positions that a picture shows; of more, neighbours are averaged and the axis says so."""


def cake_page(record: AnalysisRecord) -> Page:
    """Draw up the page of a ``cake`` record.

    Args:
        record: of :meth:`stabmon.analysis.kv_cache.report.CakeReport.to_record`.
    """
    values, arrays = record.values, record.arrays
    layers = list(values["layers"])
    names, meaning = short_layers(layers)
    findings = _findings(record)
    sections = [
        _budgets(record, names, meaning),
        _preserved(record, names),
        _kept(record, layers, names),
    ]
    if int(values["steps"]) > 0:
        sections.append(_decode(record, layers, names))
    sections += _perplexities(record)
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
            "preserved": _shares(record),
            "perplexities": _costs(record),
        },
    )


def _size(size: float) -> str:
    return (
        f"{percent(size)} of the prompt"
        if isinstance(size, float) and 0 < size < 1
        else f"{number(size)} keys"
    )


def _shares(record: AnalysisRecord) -> dict[str, dict[str, float]]:
    """Mean over layers and samples of what each choice preserves."""
    preserved = record.arrays["preserved"]
    return {
        _named(record, choice): {
            measure: float(mean_of(preserved[:, at, place]))
            for place, measure in enumerate(record.values["measures"])
        }
        for at, choice in enumerate(record.values["choices"])
    }


def _named(record: AnalysisRecord, choice: str) -> str:
    """The policy's name for its own choice, which the record calls ``kept``."""
    return str(record.values["policy"]) if choice == "kept" else choice


def _verdict(record: AnalysisRecord, names: Sequence[str]) -> list[str]:
    values = record.values
    shares = _shares(record)
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
            "window's queries; "
            f"with as many keys chosen otherwise: {', '.join(others)}."
        )
    small, full = _number(values.get("perplexity")), _number(values.get("full_perplexity"))
    if np.isfinite(small) and np.isfinite(full):
        cost = float(np.log(small / full))
        word = "more" if cost >= 0 else "less"
        said.append(
            f"Over the tokens that follow, perplexity is {number(small, 4)} with this cache and "
            f"{number(full, 4)} with the full one: "
            f"{number(abs(cost), 2)} nats a token {word}."
        )
    losses = _losses(record)
    if losses and policy in losses[1]:
        sizes, table, whole = losses
        best = {
            name: float((each - whole).mean(-1)[-1 if len(sizes) < 2 else len(sizes) // 2])
            for name, each in table.items()
        }
        at = sizes[-1 if len(sizes) < 2 else len(sizes) // 2]
        first = min(best, key=best.__getitem__)
        said.append(
            f"On text that really follows, at a cache of {number(at, 4)} keys, {policy} costs "
            f"{number(best[policy], 2)} nats a token against the full cache; "
            f"of {len(best)} policies {first.replace('_', ' ')} costs least "
            f"({number(best[first], 2)})."
        )
    said.append(
        f"Keys were evicted in {percent(values['eviction_frequency'])} of all layers and steps; "
        f"{percent(values['budget_use'])} of the allowed cache is used."
    )
    return said


def _costs(record: AnalysisRecord) -> dict[str, Any] | None:
    """Mean nats lost against the full cache, by policy and cache size."""
    losses = _losses(record)
    if losses is None:
        return None
    sizes, table, full = losses
    return {
        "cache_sizes": sizes,
        "full": float(full.mean()),
        "cost": {name: (each - full).mean(-1).tolist() for name, each in table.items()},
    }


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
    policy, shares = str(record.values["policy"]), _shares(record)
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
    losses = _losses(record)
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


def _losses(record: AnalysisRecord) -> tuple[list[float], dict[str, np.ndarray], np.ndarray] | None:
    """Cache sizes in keys; losses in nats a token, by policy ``[sizes, prompts]`` and of the full
    cache.
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


def _budgets(record: AnalysisRecord, names: list[str], meaning: str) -> Section:
    arrays = record.arrays
    budget, dispersion, shift, preference = (
        mean_of(arrays[name], 1) for name in ("budget", "dispersion", "shift", "preference")
    )
    window = int(record.values["window_size"])
    full = float(np.mean(record.values["lengths"]))
    bars = partial(
        caches.budget_bars,
        {"kept, window included": budget + window},
        names,
        full=full,
        unit="keys kept a kv head",
    )
    why = partial(caches.layer_preferences, dispersion, shift, preference, names)
    rows = [
        (name, number(float(a)), number(float(b)), number(float(c)), number(float(d), 4))
        for name, a, b, c, d in zip(names, dispersion, shift, preference, budget, strict=True)
    ]
    table = Table(
        "Averaged over samples. Dispersion: entropy of the window's attention over earlier keys, "
        "in nats, summed over heads "
        "and queries. Shift: variance of each key's weight over the window's queries, summed.",
        ("layer", "dispersion D", "shift V", "preference P", "budget beside the window"),
        rows,
    )
    pictures = [
        Picture(
            "budgets", "Keys that each layer keeps after the prompt; dashed: the full cache.", bars
        ),
        Picture(
            "preferences",
            "Dispersion, shift and the preference that the budgets are shared by.",
            why,
        ),
    ]
    return Section("Budgets", [meaning] if meaning else [], [table], pictures)


def _preserved(record: AnalysisRecord, names: list[str]) -> Section:
    preserved = record.arrays["preserved"]
    choices = [_named(record, choice).replace("_", " ") for choice in record.values["choices"]]
    pictures = []
    for place, measure in enumerate(record.values["measures"]):
        groups = {choice: mean_of(preserved[:, at, place], 1) for at, choice in enumerate(choices)}
        draw = partial(
            caches.preservation_bars,
            groups,
            names,
            unit=f"share of the {measure} that is kept",
            title=f"How much of the attention's {measure} the kept keys hold",
        )
        caption = (
            f"Share of the window's attention {measure} on kept keys, by layer; every "
            "choice keeps as many keys."
        )
        pictures.append(Picture(f"preserved_{measure}", caption, draw))
    shares = _shares(record)
    rows = [
        (
            choice.replace("_", " "),
            *(percent(share[measure]) for measure in record.values["measures"]),
        )
        for choice, share in shares.items()
    ]
    table = Table("Mean over layers and samples.", ("choice", *record.values["measures"]), rows)
    return Section("What is preserved", tables=[table], pictures=pictures)


def _averaged(share: np.ndarray) -> tuple[np.ndarray, int]:
    """Average neighbouring positions until there are at most ``MOST_POSITIONS``."""
    width = share.shape[-1]
    factor = -(-width // MOST_POSITIONS)
    if factor <= 1:
        return share, 1
    padded = np.pad(
        share, [(0, 0)] * (share.ndim - 1) + [(0, -width % factor)], constant_values=np.nan
    )
    return mean_of(padded.reshape(*share.shape[:-1], -1, factor), -1), factor


def _kept(record: AnalysisRecord, layers: list[str], names: list[str]) -> Section:
    evicted = by_layer(record, "evicted_at")
    length = int(max(record.values["lengths"]))
    prompt = record.arrays[f"scores/{layers[0]}"].shape[-1]
    share = np.stack([(evicted[layer][0, :, :prompt] != 0).mean(0) for layer in layers]).astype(
        np.float64
    )
    share[:, evicted[layers[0]][0, 0, :prompt] == -2] = np.nan
    drawn, factor = _averaged(share)
    draw = partial(
        kept_keys.kept_positions,
        drawn,
        names,
        window=int(record.values["window_size"]),
        pooled=factor,
    )
    caption = (
        f"Positions of the first prompt ({plural(length, 'token')} at most) that stay after "
        "prefill: the share of kv heads that keep each."
    )
    if factor > 1:
        caption += f" A cell is the mean of {factor} positions."
    return Section("Which positions stay", pictures=[Picture("kept", caption, draw)])


def _decode(record: AnalysisRecord, layers: list[str], names: list[str]) -> Section:
    evicted = by_layer(record, "evicted_at")
    prompt = record.arrays[f"scores/{layers[0]}"].shape[-1]
    steps = list(range(int(record.values["steps"]) + 1))
    chosen = [
        steps[at]
        for at in np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 64)).round().astype(int))
    ]
    pattern = []
    for layer in layers:
        went = evicted[layer][0]
        positions = np.arange(went.shape[-1])
        rows = []
        for step in chosen:
            held = ((went == -1) | (went > step)).mean(0)
            rows.append(np.where((positions < prompt + step) & (went[0] != -2), held, np.nan))
        pattern.append(rows)
    drawn, factor = _averaged(np.array(pattern, dtype=np.float64))
    draw = partial(kept_keys.decode_pattern, drawn, names, steps=chosen, pooled=factor)
    caption = (
        "Keys of the first sample that each layer holds after every decoded token; step 0 "
        "is the prompt."
    )
    if factor > 1:
        caption += f" A cell is the mean of {factor} positions."
    return Section("While tokens are generated", pictures=[Picture("decode", caption, draw)])


def _perplexities(record: AnalysisRecord) -> list[Section]:
    found = _losses(record)
    if not found:
        return []
    sizes, table, full = found
    shown = {name.replace("_", " "): np.exp(rows) for name, rows in table.items()}
    lost = {name.replace("_", " "): rows - full for name, rows in table.items()}
    cost = partial(
        caches.loss_against_size,
        sizes,
        lost,
        full=0.0,
        unit="nats a token lost against the full cache",
        title="What a smaller cache costs on the same prompt",
    )
    told = (
        "Loss of each prompt's continuation less that with the full cache, in nats a token: "
        "prompts "
        "differ in how hard they are, and this spread leaves that out."
    )
    draw = partial(caches.loss_against_size, sizes, shown, full=float(np.exp(np.median(full))))
    rows = [
        (
            name.replace("_", " "),
            *(
                f"{np.exp(nats):.4g} ({cost:+.3f})"
                for nats, cost in zip(each.mean(-1), (each - full).mean(-1), strict=True)
            ),
        )
        for name, each in table.items()
    ]
    rows.append(("full", *[f"{np.exp(full.mean()):.4g}"] * len(sizes)))
    head = ("policy", *(f"{number(size, 4)} keys" for size in sizes))
    values = record.values
    said = (
        f"Contexts of {number(values['perplexity_context'])} tokens were compressed once by each "
        f"policy, and the {number(values['perplexity_continuation'])} tokens "
        f"that really follow were scored, over {plural(len(full), 'prompt')}. Few prompts and "
        "untrained models say little."
    )
    caption = (
        "Perplexity of what follows against the size of the cache, for each policy: the median "
        "of the prompts and their middle half."
    )
    return [
        Section(
            "What a smaller cache costs",
            [said],
            [
                Table(
                    "Perplexity (mean over prompts), and nats a token lost against the full cache.",
                    head,
                    rows,
                )
            ],
            [Picture("perplexity", caption, draw), Picture("cost", told, cost)],
        )
    ]
