"""Sections of the page of a simulated KV cache."""

from __future__ import annotations

from functools import partial

import numpy as np

from stabmon.analysis.record import AnalysisRecord
from stabmon.figures import caches, kept_keys
from stabmon.report.cake_numbers import choice_name, losses_of, preserved_shares
from stabmon.report.numbers import number, percent, plural
from stabmon.report.page import Picture, Section, Table
from stabmon.report.words import by_layer, mean_of

MOST_POSITIONS = 1024
"""Positions of a picture; of more, neighbours are averaged and the caption says so."""


def budget_section(record: AnalysisRecord, names: list[str], meaning: str) -> Section:
    """Draw every layer's budget, and the quantities that it is derived from."""
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
        "in nats, summed over heads and queries. Shift: variance of each key's weight over the "
        "window's queries, summed.",
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


def preserved_section(record: AnalysisRecord, names: list[str]) -> Section:
    """Draw the share of attention that the kept keys hold."""
    preserved = record.arrays["preserved"]
    choices = [choice_name(record, choice).replace("_", " ") for choice in record.values["choices"]]
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
    shares = preserved_shares(record)
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


def kept_section(record: AnalysisRecord, layers: list[str], names: list[str]) -> Section:
    """Draw the positions of the first prompt that stay after prefill."""
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


def decode_section(record: AnalysisRecord, layers: list[str], names: list[str]) -> Section:
    """Draw the keys that stay at every decoded token."""
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


def perplexity_sections(record: AnalysisRecord) -> list[Section]:
    """Draw perplexity against cache size; no section if it was not measured."""
    found = losses_of(record)
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
    cost_caption = (
        "Loss of each prompt's continuation less that with the full cache, in nats a token: "
        "prompts differ in how hard they are, and this spread leaves that out."
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
            [Picture("perplexity", caption, draw), Picture("cost", cost_caption, cost)],
        )
    ]
