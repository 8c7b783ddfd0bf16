"""One leaf of each kind, found by stabmon through the entry points of ``pyproject.toml``."""
