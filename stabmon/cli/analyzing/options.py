"""Options of ``stabmon analyze``, each with the kinds of analysis that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, get_args, get_type_hints

import typer

from stabmon.cli.options import Attention, FailOn, Json, check_fail_on

KINDS = ("rollout", "patterns", "cake", "heatmap")
STORED_KINDS = (*KINDS, "evolution")
"""Kinds of record for ``--from``; ``stabmon.analysis`` stores the last one in scripts."""
FORMATS = ("png", "svg")


class Only(tuple[str, ...]):
    """Kinds that an option belongs to; options without one belong to all."""


ROLLOUT, CAKE, HEATMAP = Only(("rollout",)), Only(("cake",)), Only(("heatmap",))


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions:
    """Options of one call of ``stabmon analyze``; None where left out."""

    model: Annotated[
        str | None,
        typer.Argument(
            help="A folder, a config.json, a hub name, or package.module:callable giving an "
            "nn.Module."
        ),
    ] = None
    text: Annotated[
        str | None,
        typer.Option(
            help="A text file, token ids as .json, .npy or .pt, or a folder of images for a "
            "vision model."
        ),
    ] = None
    ids: Annotated[
        str | None,
        typer.Option(
            help="A file of token ids: .json, .npy, .pt, or whole numbers in a text file, a row a "
            "line."
        ),
    ] = None
    kind: Annotated[
        str | None,
        typer.Option(
            help="rollout, patterns, cake or heatmap; rollout if left out, with --from all that "
            "are stored."
        ),
    ] = None
    out: Annotated[
        str | None, typer.Option(help="Folder for what is found; stabmon_analysis if left out.")
    ] = None
    stored: Annotated[
        str | None,
        typer.Option(
            "--from", help="Draw again from the numbers in this folder, without the model."
        ),
    ] = None
    layers: Annotated[
        str | None,
        typer.Option(help="Numbers and ranges (0,4-7) or a regular expression; all if left out."),
        Only(("rollout", "patterns", "heatmap")),
    ] = None
    heads: Annotated[
        str | None,
        typer.Option(help="Numbers and ranges of query heads; all if left out."),
        Only(("patterns", "heatmap")),
    ] = None
    target: Annotated[
        str | None,
        typer.Option(
            help="Positions to attribute, or of the query to look at; negative ones count from "
            "the end."
        ),
        Only(("rollout", "patterns")),
    ] = None
    samples: Annotated[
        int | None, typer.Option(help="Stretches of the text, rows of ids, or images.")
    ] = None
    length: Annotated[
        int | None, typer.Option(help="Tokens a sample; at most 256 if left out.")
    ] = None
    stack: Annotated[
        str | None,
        typer.Option(
            help="rollout: which stack of a model with several, or joined for encoder and decoder."
        ),
        ROLLOUT,
    ] = None
    weighting: Annotated[
        str | None, typer.Option(help="rollout: gradient, for the class-specific form."), ROLLOUT
    ] = None
    head_fusion: Annotated[
        str | None, typer.Option(help="rollout: mean, max or min over the heads."), ROLLOUT
    ] = None
    cache_size: Annotated[
        str | None,
        typer.Option(
            help="cake: keys a head keeps on average over layers (128), or a share of the prompt "
            "(0.25)."
        ),
        CAKE,
    ] = None
    window: Annotated[
        int | None,
        typer.Option(help="cake: last queries that judge the keys; 32 if left out."),
        CAKE,
    ] = None
    tau1: Annotated[
        float | None, typer.Option(help="cake: temperature of the dispersion."), CAKE
    ] = None
    tau2: Annotated[float | None, typer.Option(help="cake: temperature of the shift."), CAKE] = None
    gamma: Annotated[
        float | None, typer.Option(help="cake: weight of the variance in a key's score."), CAKE
    ] = None
    pool: Annotated[
        int | None,
        typer.Option(help="cake: width of the average over neighbouring keys; odd."),
        CAKE,
    ] = None
    allotment: Annotated[str | None, typer.Option(help="cake: filled or published."), CAKE] = None
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="cake: tokens to generate with the compressed cache."),
        CAKE,
    ] = None
    surface: Annotated[
        bool,
        typer.Option("--surface", help="heatmap: also a 3-D surface of each layer, by plotly."),
        HEATMAP,
    ] = False
    format: Annotated[str, typer.Option(help="Of the figures: png or svg.")] = "png"
    attn: Attention = None
    seed: Annotated[
        int, typer.Option(help="Of weights that a config.json alone does not give.")
    ] = 0
    fail_on: FailOn = "error"
    as_json: Json = False

    def given(self, name: str) -> bool:
        """Return True if the user gave an option; 0 counts as given."""
        value = getattr(self, name)
        return value is not None and value is not False


def kinds_of_options() -> dict[str, Only]:
    """Return the kinds of every option that does not belong to all.

    >>> kinds_of_options()["heads"]
    ('patterns', 'heatmap')
    """
    hints = get_type_hints(AnalyzeOptions, include_extras=True)
    declared = {
        name: [each for each in get_args(hint) if isinstance(each, Only)]
        for name, hint in hints.items()
    }
    return {name: only[0] for name, only in declared.items() if only}


def check_options(options: AnalyzeOptions) -> None:
    """Check that options fit together.

    Args:
        options: of the command.

    Raises:
        ValueError: if they do not; one line that names the option and the mend.
    """
    kinds = KINDS if options.stored is None else STORED_KINDS
    if options.kind is not None and options.kind not in kinds:
        raise ValueError(f"--kind {options.kind!r}: use {', '.join(kinds)}")
    if options.format not in FORMATS:
        raise ValueError(f"--format {options.format!r}: use {', '.join(FORMATS)}")
    check_fail_on(options.fail_on)
    owners = kinds_of_options()
    if options.stored is not None:
        for name in ("text", "ids", *owners):
            if options.given(name) and name != "surface":
                raise ValueError(
                    f"{flag(name)} does not go with --from, which draws stored numbers"
                )
        return
    if options.model is None:
        raise ValueError(
            "no MODEL: give a model's folder, a config.json, a hub name or module:callable, or "
            "--from DIR"
        )
    if options.text is not None and options.ids is not None:
        raise ValueError("--text and --ids: give one of them")
    kind = options.kind or KINDS[0]
    for name, owning in owners.items():
        if options.given(name) and kind not in owning:
            raise ValueError(
                f"{flag(name)} does not apply to --kind {kind}: it is for {' and '.join(owning)}"
            )
    for name in ("samples", "length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{flag(name)} {value}: give at least 1")
    if options.weighting not in (None, "gradient"):
        raise ValueError(f"--weighting {options.weighting!r}: use gradient, or leave it out")
    if options.head_fusion not in (None, "mean", "max", "min"):
        raise ValueError(f"--head-fusion {options.head_fusion!r}: use mean, max or min")


def flag(name: str) -> str:
    """Return the flag of an option.

    >>> flag("cache_size")
    '--cache-size'
    """
    return f"--{name.replace('_', '-')}"
