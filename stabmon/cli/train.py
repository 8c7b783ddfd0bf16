"""What ``stabmon train`` does."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rich.console import Console

from stabmon.config import read_settings
from stabmon.study.report import markdown, summary, tables
from stabmon.study.study import StudySettings, run_study


def train(
    config: str, overrides: Sequence[str] = (), *, text: str | None = None, as_json: bool = False
) -> None:
    """Run the study that ``config`` and ``overrides`` describe, and print its table; it lies in
    ``run_dir`` too.

    Args:
        config: a YAML file, such as those in configs/controllers.
        overrides: settings to lay over it, such as ``base.steps=50``.
        text: a file to learn in place of the default corpus.
        as_json: print one JSON object instead of the table.

    Raises:
        SettingsError: if the settings are wrong.
        CorpusError: if the text cannot be used.
    """
    named = [f"corpus.text={json.dumps(text)}"] if text else []
    settings = read_settings(StudySettings, config, [*overrides, *named])
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
