"""The command ``stabmon train``."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from stabmon.cli.options import Json


def train(
    config: Annotated[
        str, typer.Argument(help="A YAML file, such as those in configs/controllers.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Settings to lay over it.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Learn this file in place of the default corpus.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train attention controllers and compare them with controls of the same size.

    They are trained on a corpus, on a frozen base and together with it; the table is printed and
    kept in the run's folder.
    """
    from rich.console import Console

    from stabmon.config import read_settings
    from stabmon.study.plan import StudySettings
    from stabmon.study.report import markdown, summary, tables
    from stabmon.study.study import run_study

    named = [f"corpus.text={json.dumps(text)}"] if text else []
    settings = read_settings(StudySettings, config, [*(overrides or ()), *named])
    folder = run_study(
        settings, lambda line: print(line, file=sys.stderr) if sys.stderr.isatty() else None
    )
    found = summary(settings, folder)
    (folder / "table.md").write_text(markdown(found, len(settings.seeds)))
    (folder / "table.json").write_text(json.dumps(found, indent=2) + "\n")
    if as_json:
        print(json.dumps({"schema_version": 1, "run_dir": str(folder), "tables": found}))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in tables(found, len(settings.seeds)):
        console.print(table)
    console.print(f"records in {folder}", highlight=False, soft_wrap=True)
