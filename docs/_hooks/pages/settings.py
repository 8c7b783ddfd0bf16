"""The page of all settings, from the dataclasses that declare them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

from markup import cell, table, to_markdown
from values import describe

from stabmon.check.config import CheckConfig
from stabmon.config import StabilityConfig
from stabmon.guard import Budget
from stabmon.study.plan import StudySettings

INTRO = """# Settings

A monitor and both callbacks take a preset's name (`"observe"`, `"guard"`), the path of a YAML file,
or a `StabilityConfig`; keyword arguments replace its fields. A file names the settings that it
changes; `stabmon check` and `stabmon train` have settings of their own.

Errors are one line that names the file, the key, the value and what is allowed.
"""


def page(root: Path) -> str:
    """Return the page.

    Args:
        root: the repository.
    """
    presets = "\n".join(
        f"### {file.stem} {{#preset-{file.stem}}}\n\n"
        f"```yaml\n{file.read_text(encoding='utf-8')}```\n"
        for file in sorted((root / "stabmon" / "config" / "presets").glob("*.yaml"))
    )
    return "\n".join(
        [
            INTRO,
            section("Monitor", StabilityConfig),
            "The levels of each rule stand with the [rules](rules.md), the settings of each "
            "intervention with the [interventions](interventions.md).\n",
            section("Budget", Budget),
            "## Presets\n",
            presets,
            section("Check", CheckConfig),
            *(section(name, cls) for name, cls in _with_parts("Study", StudySettings).items()),
        ]
    )


def section(title: str, cls: type) -> str:
    """Return a heading, the first paragraph of a dataclass's docstring and its settings."""
    text = to_markdown(inspect.getdoc(cls) or "").split("\n\n")[0]
    return f"## {title}\n\n`{cls.__module__}.{cls.__qualname__}`: {text}\n\n{settings_table(cls)}"


def settings_table(cls: type, leave_out: Sequence[str] = ()) -> str:
    """Return the settings of a dataclass as a table: name, values, default, meaning.

    Args:
        cls: the dataclass.
        leave_out: fields that are no settings.

    Returns:
        The table; a sentence where there is no setting.
    """
    hints, texts = get_type_hints(cls, include_extras=True), field_docs(cls)
    rows = [
        (f"`{each.name}`", cell(describe(hints[each.name])), _default(each), cell(texts[each.name]))
        for each in dataclasses.fields(cls)
        if each.init and each.name not in leave_out
    ]
    if not rows:
        return "It has no settings.\n"
    return table(("setting", "value", "default", "meaning"), rows)


def field_docs(cls: type) -> dict[str, str]:
    """Return the text below each field of a dataclass, inherited fields included."""
    found = {each.name: "" for each in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for each in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(each):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(tree, ast.ClassDef)
        for node, below in pairwise(tree.body):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                text = below.value if isinstance(below, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found[node.target.id] = text.value
    return found


def _with_parts(title: str, cls: type) -> dict[str, type]:
    """Return a dataclass of settings and those that its fields hold, by title."""
    found = {title: cls}
    for name, hint in get_type_hints(cls).items():
        for kind in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(kind) and kind not in found.values():
                found[f"{title}: {name}"] = kind  # type: ignore[assignment]
    return found


def _default(each: dataclasses.Field[Any]) -> str:
    """Return a field's default as it would stand in YAML."""
    if each.default is not dataclasses.MISSING:
        value = each.default
    elif each.default_factory is not dataclasses.MISSING:
        value = each.default_factory()
    else:
        return "required"
    if dataclasses.is_dataclass(value):
        changed = [
            f"{f.name}: {getattr(value, f.name)}"
            for f in dataclasses.fields(value)
            if getattr(value, f.name) != f.default
        ]
        return f"its own defaults{', but ' + ', '.join(changed) if changed else ''}"
    if isinstance(value, Mapping) and not value:
        return "`{}`"
    return f"`{json.dumps(value, default=str)}`"
