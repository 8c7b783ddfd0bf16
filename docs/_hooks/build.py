"""Build hooks: add the generated pages, fill in generated tables, render formulas."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from formulas import Formulas  # noqa: E402
from pages import api, commands, leaves, project, settings, treatments  # noqa: E402

TABLES = {"symptoms": treatments.symptoms, "treatments": treatments.treatments}
"""Tables that a page asks for in a comment: ``<!-- table: symptoms -->``."""


@event_priority(100)  # before mkdocstrings takes the extensions over
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Render formulas in pages and in docstrings."""
    config.markdown_extensions.append(Formulas())  # type: ignore[arg-type]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from the code."""
    made = {
        **leaves.pages(),
        "reference/settings.md": settings.page(ROOT),
        "reference/commands.md": commands.page(),
        "reference/api.md": api.page(),
        "changelog.md": project.changelog(ROOT),
        "contributing.md": project.contributing(ROOT),
    }
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the tables that a page asks for.

    Raises:
        KeyError: for a table that is not known.
    """
    return re.sub(r"<!-- table: (\w+) -->", lambda found: TABLES[found[1]](), markdown)
