"""What a monitor is told: a preset, a YAML file or a :class:`StabilityConfig`, with keyword
overrides.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from stabmon.guard import Budget, make_interventions
from stabmon.interventions import Intervention
from stabmon.operator import ENGINES
from stabmon.rules import RULES, Rule
from stabmon.signals import SIGNALS
from stabmon.sinks import SINKS, Sink

_DEFAULT_SIGNALS = (
    "attention_entropy",
    "normalized_entropy",
    "max_logit",
    "max_probability",
    "collision_probability",
    "sink_mass",
    "softmax_jacobian_norm",
    "hnf_log_curvature",
    "hnf_log_curvature_bound",
    "precision_bits",
    "saturated_fraction",
)


@dataclass(frozen=True)
class StabilityConfig:
    """Everything a monitor can be told. The fields of ``observe.yaml``, which explains each in a
    line.

    Raises:
        ValueError: naming the field, its value and what is known, for anything that cannot be.
    """

    log_every: int = 50
    signals: Sequence[str] = _DEFAULT_SIGNALS
    rules: Mapping[str, Mapping[str, Any] | bool] = field(default_factory=dict)
    sinks: Sequence[str | Sink] = ("jsonl", "console")
    engine: str = "auto"
    sample_rows: int | None = None
    attention_modules: Sequence[str] = ()
    watch_every_step: bool = True
    history: int = 256
    clear_after: int = 2
    cooldown: int = 10
    interventions: Mapping[str, Mapping[str, Any] | bool | None] = field(default_factory=dict)
    budget: Mapping[str, int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("log_every", 1), ("history", 2), ("clear_after", 1), ("cooldown", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: {value!r} must be a whole number of at least {least}")
        rows = self.sample_rows
        if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
            raise ValueError(
                f"sample_rows: {rows!r} must be a whole number of at least 1, or null for all rows"
            )
        if not isinstance(self.watch_every_step, bool):
            raise ValueError(f"watch_every_step: {self.watch_every_step!r} must be true or false")
        if self.engine != "auto" and self.engine not in ENGINES:
            raise ValueError(
                f"engine: unknown engine {self.engine!r}. Known: auto, {', '.join(ENGINES)}"
            )
        for name in ("signals", "sinks", "attention_modules"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ValueError(f"{name}: {value!r} must be a list")
        if odd := [each for each in self.attention_modules if not isinstance(each, str)]:
            raise ValueError(f"attention_modules: {odd[0]!r} must be a pattern of module names")
        if not self.signals:
            raise ValueError(
                "signals: the list is empty, name at least one (`stabmon list signals`)"
            )
        for name in self.signals:
            SIGNALS[name]
        for each in self.sinks:
            if isinstance(each, str):
                SINKS[each]
        if not isinstance(self.rules, Mapping):
            raise ValueError(f"rules: {self.rules!r} must map rule names to levels, or to false")
        self.make_rules()
        for name in ("interventions", "budget"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name}: {getattr(self, name)!r} must map names to values")
        self.make_interventions()
        self.make_budget()

    def make_interventions(self) -> dict[str, Intervention]:
        """What may be done to the run, by name.

        Raises:
            ValueError: for an unknown intervention or setting, or a value that cannot be.
        """
        return make_interventions(self.interventions)

    def make_budget(self) -> Budget:
        """How much may be done to the run.

        Raises:
            ValueError: for an unknown limit, or a value that cannot be.
        """
        known = [f.name for f in fields(Budget)]
        if unknown := sorted(set(self.budget) - set(known)):
            raise ValueError(f"budget: unknown limit {unknown[0]!r}. Known: {', '.join(known)}")
        return Budget(**self.budget)  # type: ignore[arg-type]

    def make_rules(self) -> list[Rule]:
        """Every registered rule with the levels given here, without those set to false.

        Raises:
            ValueError: for an unknown rule or level.
        """
        for name in self.rules:
            RULES[name]
        made = []
        for name, cls in RULES.items():
            levels = self.rules.get(name, {})
            if levels is False:
                continue
            if levels is True or levels is None:
                levels = {}
            if not isinstance(levels, Mapping):
                raise ValueError(f"rules.{name}: {levels!r} must map levels to values, or be false")
            known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
            if unknown := set(levels) - set(known):
                raise ValueError(
                    f"rules.{name}: unknown level {sorted(unknown)[0]!r}. Known: {', '.join(known)}"
                )
            for level, value in levels.items():
                if isinstance(value, str | bool) or not isinstance(value, int | float):
                    raise ValueError(f"rules.{name}.{level}: {value!r} must be a number")
            made.append(cls(**levels))
        return made

    def make_sinks(self) -> list[Sink]:
        """The sinks, those given by name made with their defaults."""
        return [SINKS[each]() if isinstance(each, str) else each for each in self.sinks]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, one entry a field."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["sinks"] = [
            each if isinstance(each, str) else type(each).__name__ for each in self.sinks
        ]
        for each in ("rules", "interventions"):
            values[each] = {
                name: dict(v) if isinstance(v, Mapping) else v for name, v in values[each].items()
            }
        values["budget"] = dict(self.budget)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def presets() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in files("stabmon.config.presets").iterdir()
        if entry.name.endswith(".yaml")
    )


def load_config(
    config: str | Path | StabilityConfig | None = "observe", **overrides: Any
) -> StabilityConfig:
    """The configuration that a preset's name, a YAML file's path or a :class:`StabilityConfig`
    stands for.

    Args:
        config: see above; None is ``"observe"``.
        **overrides: fields that replace the configuration's own; None leaves a field as it is.

    Raises:
        ValueError: naming the file and the key, for a name, key or value that is not known.

    >>> load_config("observe", log_every=10).log_every
    10
    >>> load_config("obsrve")
    Traceback (most recent call last):
    ValueError: config 'obsrve' is neither a preset (guard, observe) nor a YAML file: give one of
        these
    """
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if isinstance(config, StabilityConfig):
        _check_keys(overrides, "argument")
        return replace(config, **overrides)
    name = str(config or "observe")
    if name in presets():
        text, where = (
            (files("stabmon.config.presets") / f"{name}.yaml").read_text(),
            f"preset {name}",
        )
    elif Path(name).suffix in {".yaml", ".yml"} or Path(name).is_file():
        where = name
        try:
            text = Path(name).read_text()
        except OSError as error:
            raise ValueError(
                f"config {name}: {error.strerror or error}; give a readable YAML file or a "
                "preset's name"
            ) from None
    else:
        raise ValueError(
            f"config {name!r} is neither a preset ({', '.join(presets())}) nor a YAML file: give "
            "one of these"
        )
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not valid YAML, {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"{where}: holds a {type(values).__name__}, must map field names to values"
        )
    _check_keys(values, where)
    _check_keys(overrides, "argument")
    try:
        read = StabilityConfig(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return replace(read, **overrides)


def _check_keys(values: Mapping[str, Any], where: str) -> None:
    known = [f.name for f in fields(StabilityConfig)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"{where}: unknown key {key!r}{hint} Known: {', '.join(known)}")
