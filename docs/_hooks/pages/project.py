"""Pages of the project that lie outside ``docs/``."""

from __future__ import annotations

import re
from pathlib import Path


def changelog(root: Path) -> str:
    """Return the changelog."""
    return (root / "CHANGELOG.md").read_text(encoding="utf-8")


def contributing(root: Path) -> str:
    """Return the notes for contributors, with links to this site's pages."""
    text = (root / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.sub(r"\(\.\./docs/", "(", text)
