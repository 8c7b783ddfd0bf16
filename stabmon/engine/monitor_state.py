"""What a monitor's stored state must be to be taken up: its version, its model, and issues that are
still known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from stabmon._storage.stored_value import Stored
from stabmon._torch.forward_call import is_split
from stabmon.capture import clean_name
from stabmon.model_names import HEAD_COUNTS
from stabmon.records import StabilityIssue
from stabmon.rules import RULES
from stabmon.rules.tracking.issue_tracker import IssueTracker
from stabmon.signals import SIGNALS

STATE_VERSION = 1
"""Of what ``state_dict`` gives; a state without one is of before there were any, and is read the
same.
"""


def check_version(saved: Stored) -> None:
    """Raise a ValueError for a state that is none, or of a later version than this."""
    try:
        version = saved.get("version", 0).integer()
    except ValueError as error:
        raise ValueError(f"no monitor's state ({error}): give what state_dict() returned") from None
    if version > STATE_VERSION:
        raise ValueError(
            f"a state of version {version}, but this stabmon reads up to {STATE_VERSION}: update "
            "stabmon"
        )


def known_issues(saved: Stored, tracker: IssueTracker) -> list[StabilityIssue]:
    """Issues of types that there are today, or that a rule of today has open; others are left
    out.
    """
    known = {issue.issue_type for issue in tracker.open_issues}
    issues = []
    for each in saved.parts():
        issue = StabilityIssue.from_dict(each)
        if issue.issue_type in known or issue.issue_type in RULES:
            issues.append(issue)
        else:
            each.leave_out(f"no issue {issue.issue_type!r} is known any more")
    return issues


def attention_of(model: nn.Module, layers: Sequence[str]) -> dict[str, Any]:
    """What tells the attention of one model from another's, by layer: heads and shapes of weights,
    as far as modules tell them.
    """
    modules = {
        clean_name(name) or type(module).__name__: module
        for name, module in model.named_modules(remove_duplicate=False)
    }
    split = is_split(model)
    return {layer: _about(modules[layer], split) for layer in layers if layer in modules}


def check_model(
    model: nn.Module, layers: Sequence[str], saved: Mapping[str, Mapping[str, Any]] | None
) -> None:
    """Raise a ValueError where a state is not one of this model.

    Args:
        model: this model.
        layers: the state's attention layers.
        saved: what :func:`attention_of` told of them; None in states of before there were versions.
    """
    names = [layer.partition("#")[0] for layer in layers] if saved is None else list(saved)
    own = attention_of(model, names)
    for name in names:
        was = {} if saved is None else saved[name]
        words = (
            ""
            if name in own
            else f"its attention layer {name} is no module of this {type(model).__name__}"
        )
        for about, value in own.get(name, {}).items():
            if was.get(about, value) != value:
                words = f"{about} of {name} was {was[about]!r} and is {value!r}"
        if words:
            raise ValueError(
                f"a state of another model ({words}): give the state of a run on the same model"
            )


def _about(module: nn.Module, split: bool) -> dict[str, Any]:
    owners = (module, getattr(module, "config", None))
    told = [getattr(owner, name, None) for owner in owners for name in HEAD_COUNTS]
    about: dict[str, Any] = {"heads": next((each for each in told if type(each) is int), None)}
    if not split:
        about |= {
            clean_name(name): list(each.shape)
            for name, each in module.named_parameters()
            if not is_lazy(each)
        }
    return about


@dataclass(frozen=True)
class SavedState:
    """A stored state that has been read whole."""

    step: int
    last_reading: int
    """The step of the newest reading."""
    issues: Sequence[StabilityIssue]
    restore: Sequence[Callable[[], None]]
    """Each sets one part of the monitor to its stored state, and does not raise."""
    left_out: Sequence[str]
    """Everything that is no longer known, in words."""


Parser = Callable[[Any], Callable[[], None]]


def parse(
    state: Mapping[str, Any], model: nn.Module, tracker: IssueTracker, parts: Mapping[str, Parser]
) -> SavedState:
    """Read a stored state whole, and change nothing but ``tracker``.

    Args:
        state: what ``state_dict`` returned.
        model: this monitor's model.
        tracker: a new tracker, which takes the stored history and open issues.
        parts: for each further key of the state a function that reads its value and returns one
            that restores it.

    Raises:
        ValueError: if it is no monitor's state, one of another model, or of a later version.
    """
    saved = Stored(state)
    check_version(saved)
    try:
        tracker.load_state_dict(saved["tracker"], SIGNALS)
        issues = known_issues(saved["issues"], tracker)
        step, last_reading = saved["step"].integer(), saved["last_reading"].integer()
        restore = [
            read(saved.get(key, None) if key in OPTIONAL else saved[key])
            for key, read in parts.items()
        ]
        layers = (
            {name: each.mapping() for name, each in saved["model"].items()}
            if "model" in saved
            else None
        )
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        words = " ".join(f"{kind}{error}".split())
        raise ValueError(
            f"no monitor's state ({words}): give what state_dict() returned"
        ) from error
    check_model(model, tracker.history.layers, layers)
    return SavedState(step, last_reading, issues, restore, saved.left_out)


OPTIONAL = frozenset({"step_length"})
"""Parts that states of the first versions do not have."""
