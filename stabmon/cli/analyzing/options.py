"""The options of ``stabmon analyze``, and which of them belong to which kind."""

from __future__ import annotations

import re
from dataclasses import dataclass

KINDS = ("rollout", "patterns", "cake", "heatmap")
STORED_KINDS = (*KINDS, "evolution")
"""What ``--from`` draws: also records that ``stabmon.analysis`` made in a script."""
FORMATS = ("png", "svg")


@dataclass(frozen=True)
class Options:
    """Hold the command's options; None where left out."""

    model: str | None = None
    text: str | None = None
    ids: str | None = None
    kind: str | None = None
    out: str | None = None
    stored: str | None = None
    layers: str | None = None
    heads: str | None = None
    target: str | None = None
    samples: int | None = None
    length: int | None = None
    stack: str | None = None
    weighting: str | None = None
    head_fusion: str | None = None
    cache_size: str | None = None
    window: int | None = None
    tau1: float | None = None
    tau2: float | None = None
    gamma: float | None = None
    pool: int | None = None
    allotment: str | None = None
    max_new_tokens: int | None = None
    surface: bool | None = None
    format: str = "png"
    attn: str | None = None
    seed: int = 0
    fail_on: str = "error"
    as_json: bool = False


BELONGS = {
    "layers": ("rollout", "patterns", "heatmap"),
    "heads": ("patterns", "heatmap"),
    "target": ("rollout", "patterns"),
    "stack": ("rollout",),
    "weighting": ("rollout",),
    "head_fusion": ("rollout",),
    "surface": ("heatmap",),
    **dict.fromkeys(
        ("cache_size", "window", "tau1", "tau2", "gamma", "pool", "allotment", "max_new_tokens"),
        ("cake",),
    ),
}
"""Option -> the kinds that it belongs to; others belong to all."""


def check_options(options: Options) -> None:
    """Refuse options that do not fit together.

    Raises:
        ValueError: in one line, naming the option and the mend.
    """
    kinds = KINDS if options.stored is None else STORED_KINDS
    if options.kind is not None and options.kind not in kinds:
        raise ValueError(f"--kind {options.kind!r}: use {', '.join(kinds)}")
    if options.format not in FORMATS:
        raise ValueError(f"--format {options.format!r}: use {', '.join(FORMATS)}")
    if options.fail_on not in ("warning", "error"):
        raise ValueError(f"--fail-on {options.fail_on!r}: use warning or error")
    if options.stored is not None:
        given = [
            name
            for name in ("text", "ids", *BELONGS)
            if getattr(options, name) is not None and name != "surface"
        ]
        if given:
            raise ValueError(
                f"{_flag(given[0])} does not go with --from, which draws stored numbers"
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
    for name, whose in BELONGS.items():
        if getattr(options, name) is not None and kind not in whose:
            raise ValueError(
                f"{_flag(name)} does not apply to --kind {kind}: it is for {' and '.join(whose)}"
            )
    for name in ("samples", "length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{_flag(name)} {value}: give at least 1")
    if options.weighting not in (None, "gradient"):
        raise ValueError(f"--weighting {options.weighting!r}: use gradient, or leave it out")
    if options.head_fusion not in (None, "mean", "max", "min"):
        raise ValueError(f"--head-fusion {options.head_fusion!r}: use mean, max or min")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parsed_numbers(text: str, flag: str) -> list[int]:
    """Read numbers and ranges such as ``0,3,5-7`` or ``-1``.

    Raises:
        ValueError: if there is anything else.

    >>> parsed_numbers("0,3,5-7", "--heads"), parsed_numbers("-1", "--target")
    ([0, 3, 5, 6, 7], [-1])
    """
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", part)
        if found is None or (found[2] is not None and int(found[2]) < int(found[1])):
            raise ValueError(f"{flag} {text!r}: give numbers or ranges, such as 0,3,5-7")
        low = int(found[1])
        numbers += range(low, int(found[2]) + 1) if found[2] is not None else [low]
    return list(dict.fromkeys(numbers))


def parsed_size(text: str) -> int | float:
    """Read a cache size: keys, or a share of the prompt.

    Raises:
        ValueError: if it is neither.

    >>> parsed_size("128"), parsed_size("0.25"), parsed_size("25%")
    (128, 0.25, 0.25)
    """
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError(
            f"--cache-size {text!r}: give keys, such as 128, or a share of the prompt, such as 0.25"
        ) from None
    if 0 < value < 1:
        return value
    if value >= 1 and value == int(value) and not text.endswith("%"):
        return int(value)
    raise ValueError(
        f"--cache-size {text!r}: give a whole number of keys, or a share between 0 and 1"
    )
