"""Sections of the page of a rollout."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from stabmon.analysis.record import AnalysisRecord
from stabmon.figures import heatmaps, images, lines, texts
from stabmon.figures.pooling import block_max
from stabmon.report.numbers import number, percent, plural
from stabmon.report.page import Picture, Section, Table
from stabmon.report.rollout_rows import ShownRow, column_names, valid_rows
from stabmon.report.words import tokens_of

MOST_SAMPLES = 6
"""Largest number of samples drawn; the numbers of all are stored."""
SIDE = 512
"""Longest side of the drawn matrix; longer ones are pooled."""


def text_section(record: AnalysisRecord, rows: list[ShownRow]) -> Section:
    """Show the tokens of every sample, shaded by the share owed to them."""
    fragments, pictures = [], []
    for sample, (position, _, weights) in enumerate(rows[:MOST_SAMPLES]):
        columns = column_names(record, sample)
        valid = record.arrays["source_valid"][sample].astype(bool)
        whole = record.values.get("sources") is None and len(valid) == len(columns)
        kept = np.flatnonzero(valid) if whole else np.arange(len(columns))
        shown = [columns[at] for at in kept]
        found = np.flatnonzero(kept == position)
        marked = int(found[0]) if len(found) and record.values.get("stack") != "joined" else None
        if tokens_of(record, sample) is None:
            shown = [f" {token}" for token in shown]
        title = f"Sample {sample}: what the token at position {position} owes to each token"
        head = f"<h3>{title}</h3>" if len(rows) > 1 else ""
        fragments.append(
            head + texts.text_html(shown, weights[kept], unit="share", marked=marked, most=12)
        )
        draw = partial(
            texts.text_figure,
            shown,
            weights[kept],
            unit="share owed",
            title=title,
            marked=marked,
        )
        caption = f"{title}: darker means more; framed is the token itself."
        pictures.append(Picture(f"text_{sample}", caption, draw, inline=False))
    said = [
        "Darker tokens are owed more; point at one for its number. The largest are in the table "
        "below the text."
    ]
    if len(rows) > MOST_SAMPLES:
        said.append(
            f"The first {MOST_SAMPLES} of {len(rows)} samples are drawn; the numbers of all are "
            "in the stored files."
        )
    return Section(
        "What the target owes to each token", said, fragments=fragments, pictures=pictures
    )


def image_section(record: AnalysisRecord, grid: Mapping[str, int], rows: list[ShownRow]) -> Section:
    """Show the patches of every image, shaded by the share owed to them."""
    fragments, pictures = [], []
    seen = record.arrays.get("images")
    for sample, (_, _, weights) in enumerate(rows[:MOST_SAMPLES]):
        patches = weights[grid["leading"] :].reshape(grid["rows"], grid["cols"])
        title = f"Image {sample}: share owed to each patch"
        if seen is None:
            draw = partial(
                heatmaps.single_map,
                patches,
                title=title,
                unit="share owed",
                power=1.0,
                axes_names=("row of patches", "column of patches"),
            )
        else:
            picture = seen[sample]
            fragments.append(f"<h3>{title}</h3>" + images.image_html(picture, patches))
            draw = partial(images.image_figure, picture, patches, unit="share owed", title=title)
        caption = f"{title}; bright patches are owed most. The scale is the image's own."
        pictures.append(Picture(f"image_{sample}", caption, draw, inline=seen is None))
    said = [
        f"Patches: {grid['rows']} × {grid['cols']}, after "
        f"{plural(grid['leading'], 'special token')}."
    ]
    return Section("What is owed to each patch", said, fragments=fragments, pictures=pictures)


def matrix_section(record: AnalysisRecord) -> Section:
    """Show the whole matrix of the first sample."""
    matrix, factor = block_max(record.arrays["matrix"][0], SIDE)
    tokens = column_names(record, 0) if tokens_of(record) else None
    targets = record.values.get("targets")
    rows = None
    if tokens is not None and targets is not None and len(tokens) > max(targets[0]):
        rows = [tokens[at] for at in targets[0]]
    elif targets is None and matrix.shape[0] == matrix.shape[1]:
        rows = tokens
    draw = partial(
        heatmaps.single_map,
        matrix,
        queries=rows,
        keys=tokens,
        unit="share owed",
        pooled=factor,
        title="Rollout of the first sample",
        axes_names=("output", "input"),
    )
    caption = (
        "Each row is a token after the last layer; its shares over the input's tokens sum to 1."
    )
    return Section("All tokens", pictures=[Picture("matrix", caption, draw)])


def first_token_section(
    record: AnalysisRecord, shares: np.ndarray, rows: list[ShownRow]
) -> Section:
    """Report the first token's share ``shares`` ``[B, T]``."""
    table = Table(
        "The first token's share of the row that is shown, and averaged over the valid rows.",
        ("sample", "target", "share of the first token", "mean over rows"),
        [
            (
                str(sample),
                str(row[0]) if row[0] >= 0 else "mean of all",
                percent(float(shares[sample, row[1]])),
                percent(_mean(shares[sample], valid_rows(record)[sample])),
            )
            for sample, row in enumerate(rows)
        ],
    )
    said = (
        "Under a causal mask rollout drifts to the first token with depth, whatever the text "
        "says: each layer passes on what the "
        "layers before have gathered there. Hold the pictures against this share."
    )
    return Section("The first token's share", [said], [table])


def _mean(values: np.ndarray, valid: np.ndarray) -> float:
    return float(values[valid].mean()) if valid.any() else float("nan")


def number_sections(values: Mapping[str, Any]) -> list[Section]:
    """Report the attribution in numbers, and the deletion check if there is one."""
    sections = []
    attribution = values.get("attribution")
    if attribution:
        rows = [(name.replace("_", " "), number(value, 4)) for name, value in attribution.items()]
        said = (
            "Of the layer's attention and of the rollout, averaged over heads, samples and valid "
            "rows; entropies in nats. The mean attention is 1 over the number of visible keys by "
            "construction."
        )
        sections.append(
            Section(
                "In eight numbers",
                [said],
                [Table("compute_attention_attribution", ("name", "value"), rows)],
            )
        )
    checked = values.get("faithfulness")
    if checked and checked.get("effects"):
        sections.append(_deletions(checked))
    return sections


def _deletions(checked: Mapping[str, Any]) -> Section:
    effects = checked["effects"]
    rows = [
        (
            number(each["k"]),
            number(each["top_drop"]),
            f"{number(each['random_drop'])} ± {number(each['random_std'], 2)}",
            percent(float(each["better_than_random"])),
        )
        for each in effects
    ]
    table = Table(
        "Drop of the log-probability of the model's own prediction, in nats; ±: over random draws.",
        ("tokens deleted", "those owed most", "random ones", "the former hurt more"),
        rows,
    )
    said = (
        f"The tokens that the target owes most were taken away ({checked['way']}), and as many "
        "random ones: where the first hurts no more than the second, the attribution does not say "
        "what the model uses."
    )
    steps = [each["k"] for each in effects]
    draw = partial(
        lines.over_time,
        steps,
        {
            "those owed most": np.array([each["top_drop"] for each in effects], dtype=np.float64),
            "random ones": np.array([each["random_drop"] for each in effects], dtype=np.float64),
        },
        unit="drop of the log-probability, nats",
        title="What deleting tokens does to the model's own prediction",
        step_name="tokens deleted",
    )
    caption = "Deleting the tokens that are owed most should hurt more than deleting random ones."
    return Section("Is it faithful?", [said], [table], [Picture("deletions", caption, draw)])
