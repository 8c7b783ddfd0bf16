"""Declaration of a monitor's settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from stabmon._settings import (
    Bounds,
    ByName,
    Count,
    FieldsOf,
    Known,
    NonEmpty,
    check,
    settings_of,
)
from stabmon.guard import Budget, make_interventions
from stabmon.interventions import INTERVENTIONS, Intervention
from stabmon.operator import ENGINES
from stabmon.rules import RULES, Rule
from stabmon.signals import SIGNALS
from stabmon.sinks import SINKS, Sink


@dataclass(frozen=True)
class StabilityConfig:
    """Settings of a monitor, as :func:`~stabmon.config.load_config` reads them.

    Raises:
        ValueError: for an unknown name, or a value of the wrong type or size.

    Example:
        >>> StabilityConfig(rules={"loss_spike": False}).log_every
        50
    """

    log_every: Count = 50
    """Sample every N-th optimizer step of a quiet run; see `schedule`."""
    schedule: Literal["adaptive", "fixed"] = "adaptive"
    """Steps to sample: adaptive for the first steps, every `log_every`-th, and more while something
    moves; fixed for every `log_every`-th alone.
    """
    max_overhead: Annotated[float, Bounds(above=0, high=1)] = 0.01
    """Most of the run's time that sampled steps may take, as a share; the adaptive schedule puts
    samples off where they would take more, but for the first 128. 1 for no limit.
    """
    signals: Annotated[Sequence[Annotated[str, Known(SIGNALS, "signal")]], NonEmpty()] = (
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
    """Signals to measure, one value per query head; `stabmon list signals` has all."""
    rules: Annotated[Mapping[str, Any], ByName(RULES)] = field(default_factory=dict)
    """Levels of rules: all rules are on as they come; `entropy_collapse: {floor: 0.05}` sets a
    level, `loss_spike: false` turns a rule off; `stabmon list rules` has all.
    """
    false_alarm_rate: Annotated[float, Bounds(above=0, high=0.5)] = 0.05
    """Share of healthy runs in which attention may alarm falsely: a smaller one alarms later, and in
    fewer runs that fail.
    """
    sinks: Sequence[Annotated[str, Known(SINKS, "sink")] | Sink] = ("jsonl", "console")
    """Sinks that records go to; `stabmon list sinks` has all."""
    report: bool = True
    """Write a page of the run into the folder of its records as it ends, where that takes no more
    than 1% of the run's time (2 seconds in a short run); `stabmon report` writes it at any time.
    """
    per_head: bool = False
    """Values of every head on the dashboards too: W&B, TensorBoard and other sinks that are given by
    name, or made for the framework's own loggers.
    """
    engine: Annotated[str, Known(("auto", *ENGINES), "engine")] = "auto"
    """Engine of the measurement: blockwise, fused, dense (small inputs only), or auto for the
    fastest exact one.
    """
    sample_rows: Count | None = None
    """Query rows to measure means on; null for all. Maxima are exact either way."""
    attention_modules: Sequence[str] = ()
    """Patterns of module names whose hand-written softmax is attention, for modules that are not
    recognised without.
    """
    watch_every_step: bool = True
    """Notice a non-finite loss or gradient at the step in which it occurs, not only at samples."""
    history: Annotated[int, Bounds(2)] = 256
    """Readings kept for the rules."""
    clear_after: Count = 2
    """Samples for which an issue must be gone before it is closed."""
    cooldown: Annotated[int, Bounds(0)] = 10
    """Samples for which a closed issue is not opened again unless it is worse."""
    interventions: Annotated[Mapping[str, Any], ByName(INTERVENTIONS)] = field(default_factory=dict)
    """Interventions that may be applied without asking, with their settings; none by default;
    `stabmon list interventions` has all.
    """
    budget: Annotated[Mapping[str, Any], FieldsOf(Budget)] = field(default_factory=dict)
    """Limits on all interventions together; samples are sampled optimizer steps."""

    def __post_init__(self) -> None:
        check(self)

    def make_interventions(self) -> dict[str, Intervention]:
        """Return the interventions that are on, by name.

        Returns:
            Intervention by registered name; empty where none is named.

        Example:
            >>> config = StabilityConfig(interventions={"qk_clip": {"target": 50.0}})
            >>> config.make_interventions()["qk_clip"].target
            50.0
        """
        return make_interventions(self.interventions)

    def make_budget(self) -> Budget:
        """Return the limits on interventions.

        Returns:
            The limits; those that ``budget`` does not name have their defaults.

        Example:
            >>> StabilityConfig(budget={"max_rollbacks": 1}).make_budget().max_rollbacks
            1
        """
        return Budget(**self.budget)

    def make_rules(self) -> list[Rule]:
        """Return every registered rule that is not set to false, with its levels.

        Returns:
            The rules, in the order of the registry.

        Example:
            >>> config = StabilityConfig(rules={"loss_spike": False})
            >>> len(list(RULES)) - len(config.make_rules())
            1
        """
        on = {name: self.rules.get(name) for name in RULES if self.rules.get(name) is not False}
        made: Mapping[str, Rule] = ByName(RULES).make(on, "rules")
        return list(made.values())

    def make_sinks(self) -> list[Sink]:
        """Return the sinks; those given by name are made as :meth:`make_sink` does.

        Returns:
            The sinks, in the given order.

        Example:
            >>> [type(each).__name__ for each in StabilityConfig(sinks=["jsonl"]).make_sinks()]
            ['JsonlSink']
        """
        return [self.make_sink(each) if isinstance(each, str) else each for each in self.sinks]

    def make_sink(self, name: str, **arguments: Any) -> Sink:
        """Return a sink by its registered name, with every head where ``per_head`` is set.

        Args:
            name: the sink's name.
            **arguments: arguments of its class.

        Returns:
            The sink; one that has no argument ``per_head`` is made without it.

        Raises:
            ValueError: if no sink has that name.

        Example:
            >>> type(StabilityConfig(per_head=True).make_sink("jsonl")).__name__
            'JsonlSink'
        """
        cls: Any = SINKS[name]
        if self.per_head and "per_head" in inspect.signature(cls).parameters:
            arguments = {"per_head": True, **arguments}
        made: Sink = cls(**arguments)
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values.

        Returns:
            Value by field, of dicts, lists, numbers and strings; as YAML it is a file for
            :func:`~stabmon.config.load_config`. Sinks given as objects are class names.

        Example:
            >>> StabilityConfig(log_every=10).to_dict()["log_every"]
            10
        """
        names = [each if isinstance(each, str) else type(each).__name__ for each in self.sinks]
        plain: dict[str, Any] = _plain({**settings_of(self), "sinks": names})
        return plain


def _plain(value: Any) -> Any:
    """Return a value of dicts and lists only."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
