"""What every registered signal, rule, intervention, controller and sink must keep to."""

import inspect
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import pytest

from stabmon.controllers import CONTROLLERS
from stabmon.controllers.base import Controller, Site
from stabmon.interventions import INTERVENTIONS, Intervention
from stabmon.records import LayerInfo, Reading, StabilityIssue
from stabmon.registry import Registry
from stabmon.rules import RULES, History, symptoms
from stabmon.rules.symptoms import Symptom
from stabmon.signals import SIGNALS
from stabmon.sinks import SINKS, Sink

REGISTRIES: dict[str, Registry[Any]] = {
    "signal": SIGNALS,
    "rule": RULES,
    "intervention": INTERVENTIONS,
    "controller": CONTROLLERS,
    "sink": SINKS,
}


def history(values: np.ndarray) -> History:
    """Readings of one layer of two heads, every signal at ``values[t]``."""
    past = History()
    for t, value in enumerate(values):
        signals = {name: np.full(2, value) for name in SIGNALS}
        info = {"layer": LayerInfo(2, 8, 0.35, "float16", fused=False)}
        past.add(
            Reading(
                10 * (t + 1),
                float(value),
                {"layer": signals},
                info,
                gradients={"": float(value), "layer": float(value)},
            )
        )
    return past


@pytest.mark.parametrize("kind", REGISTRIES)
def test_an_unknown_name_is_told_with_the_known_ones(kind: str) -> None:
    known = list(REGISTRIES[kind])
    with pytest.raises(ValueError, match=f"unknown {kind} 'nonesuch'.*{known[0]}.*{known[-1]}"):
        REGISTRIES[kind]["nonesuch"]


@pytest.mark.parametrize("kind", REGISTRIES)
def test_a_second_entry_of_a_name_is_refused(kind: str) -> None:
    name = next(iter(REGISTRIES[kind]))
    with pytest.raises(ValueError, match="registered twice"):
        REGISTRIES[kind].register(name, object())


@pytest.mark.parametrize("name", list(SIGNALS))
def test_a_signal_says_what_it_returns_and_where_it_comes_from(name: str) -> None:
    one, text = SIGNALS[name], inspect.getdoc(SIGNALS[name].function) or ""
    assert one.function.__name__ == name
    assert "[B, H, Q]" in text
    assert "Returns:" in text
    for section in ("Args:", "Example:", "References:"):
        assert section in text
    assert one.unit


@pytest.mark.parametrize("name", list(RULES))
def test_a_rule_is_a_frozen_dataclass_that_stands_by_itself(name: str) -> None:
    made = RULES[name]()
    assert is_dataclass(made)
    assert inspect.getdoc(RULES[name])
    with pytest.raises((AttributeError, TypeError)):
        made.anything = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize(
    "values",
    [
        np.array([]),
        np.array([3.0]),
        np.array([np.nan] * 12),
        np.array([1.0, np.inf, -np.inf, np.nan] * 4),
        np.zeros(12),
        np.geomspace(1e-30, 1e30, 30),
        -np.geomspace(1, 1e6, 20),
    ],
    ids=["none", "one", "nan", "mixed", "zero", "explodes", "negative"],
)
def test_a_rule_bears_any_history(name: str, values: np.ndarray) -> None:
    past = history(values)
    if len(past):
        for issue in RULES[name]().check(past):
            assert isinstance(issue, StabilityIssue)
            assert issue.suggestion


@pytest.mark.parametrize("name", list(RULES))
def test_a_rule_is_silent_on_a_steady_head(name: str) -> None:
    assert list(RULES[name]().check(history(np.full(40, 0.9)))) == []


@pytest.mark.parametrize("name", list(INTERVENTIONS))
def test_an_intervention_is_a_frozen_dataclass_with_plain_settings(name: str) -> None:
    made = INTERVENTIONS[name]()
    assert isinstance(made, Intervention)
    assert made.name == name
    assert inspect.getdoc(INTERVENTIONS[name])
    assert all(
        isinstance(value, (bool, int, float, str, type(None))) for value in made.settings.values()
    )
    with pytest.raises((AttributeError, TypeError)):
        made.anything = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", list(INTERVENTIONS))
def test_an_intervention_treats_symptoms_that_rules_declare(name: str) -> None:
    declared = {each.name for each in vars(symptoms).values() if isinstance(each, Symptom)}
    treated = set(INTERVENTIONS[name].treats)
    assert treated <= declared
    assert treated or INTERVENTIONS[name].install_at_start


@pytest.mark.parametrize("name", list(CONTROLLERS))
def test_a_controller_is_documented_and_its_parameters_are_its_own(name: str) -> None:
    site = Site("layers.0.attention", heads=2, width=8, index=0, count=2)
    made = CONTROLLERS[name](site)
    assert isinstance(made, Controller)
    assert inspect.getdoc(CONTROLLERS[name])
    assert all(np.isfinite(each.detach().numpy()).all() for each in made.parameters())


@pytest.mark.parametrize("name", list(SINKS))
def test_a_sink_is_made_without_arguments_and_closes_twice(name: str) -> None:
    made = SINKS[name]()
    assert isinstance(made, Sink)
    made.close()
    made.close()
