"""Write presets out in full, each setting with a line of explanation, for reading and copying.

``python -m stabmon.config.write_presets configs`` writes ``configs/observe.yaml`` and
``configs/guard.yaml`` anew, after a change of a preset or of the docs of a setting.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from stabmon._settings import settings_of
from stabmon._settings.docs import setting_docs
from stabmon.config.load import load_config, preset_files, presets
from stabmon.config.schema import StabilityConfig
from stabmon.guard import Budget

WIDTH = 100
NOTE = (
    "Every setting of the preset `{name}`, written by `python -m stabmon.config.write_presets "
    "configs`. A file of yours may name a few settings alone, with `extends: {name}` above them: "
    "the others are then those of the preset."
)


def preset_in_full(name: str) -> str:
    """Return the YAML text of a preset with every setting and its explanation.

    Args:
        name: one of :func:`~stabmon.config.presets`.

    Example:
        >>> print(preset_in_full("observe").split("\\n\\n")[1])
        # Sample every N-th optimizer step of a quiet run; see `schedule`.
        log_every: 50
    """
    config, written = load_config(name), preset_files()[name].read_text(encoding="utf-8")
    header, own = _parts(written)
    blocks = [header + _comment(NOTE.format(name=name))]
    for key, text in setting_docs(StabilityConfig).items():
        if key == "budget":
            block = "budget:\n" + "".join(_budget(config.make_budget()))
        else:
            block = own.get(key) or _dump({key: config.to_dict()[key]})
        blocks.append(_comment(text) + block)
    return "\n".join(blocks)


def _parts(text: str) -> tuple[str, dict[str, str]]:
    """Return the comment above a YAML text, and the text of each key with its comments."""
    header, *blocks = re.split(r"^(?=\w)", text, flags=re.MULTILINE)
    return header, {block.partition(":")[0]: block for block in blocks}


def _budget(budget: Budget) -> Iterator[str]:
    for key, text in setting_docs(Budget).items():
        yield textwrap.indent(
            _comment(text, WIDTH - 2) + _dump({key: settings_of(budget)[key]}), "  "
        )


def _comment(text: str, width: int = WIDTH) -> str:
    return textwrap.fill(text, width, initial_indent="# ", subsequent_indent="# ") + "\n"


def _dump(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False)


if __name__ == "__main__":
    for each in presets():
        (Path(sys.argv[1]) / f"{each}.yaml").write_text(preset_in_full(each), encoding="utf-8")
