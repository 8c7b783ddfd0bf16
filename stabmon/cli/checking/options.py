"""Options of ``stabmon check``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from stabmon.cli.options import Attention, FailOn, Json


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Options of one call of ``stabmon check``; None where left out."""

    model: Annotated[
        str,
        typer.Argument(
            help="A folder, a config.json, a hub name, or package.module:callable giving an "
            "nn.Module."
        ),
    ]
    seq_len: Annotated[
        int | None,
        typer.Option(min=2, help="Length to train at, in tokens; the config's own if left out."),
    ] = None
    dtype: Annotated[
        str, typer.Option(help="Precision to train in: fp16, bf16 or fp32; torch's names too.")
    ] = "fp32"
    attn: Attention = None
    text: Annotated[
        str | None, typer.Option(help="A file to take the sample from; random tokens if left out.")
    ] = None
    batch: Annotated[int, typer.Option(help="Sequences in the sample.")] = 1
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate to judge; --sweep tries rates around it."),
    ] = None
    schedule: Annotated[
        str, typer.Option(help="constant, linear or cosine, and warm-up steps: cosine:20.")
    ] = "constant"
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep", help="Train a few dozen steps at several rates, and say which blows up."
        ),
    ] = False
    region: Annotated[
        bool,
        typer.Option("--region", help="Which temperatures, head sizes and lengths are stable."),
    ] = False
    plot: Annotated[str | None, typer.Option(help="Draw the stability region into this file.")] = (
        None
    )
    markdown: Annotated[str | None, typer.Option(help="Also write the report into this file.")] = (
        None
    )
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0
    fail_on: FailOn = "error"
    as_json: Json = False
