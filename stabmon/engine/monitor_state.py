"""What a monitor's stored state must be to be taken up: its version, its model, and issues that are
still known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from stabmon._storage.stored_value import Stored
from stabmon._torch.forward_call import is_split
from stabmon.capture import clean_name
from stabmon.capture.protocol import HEADS
from stabmon.records import StabilityIssue
from stabmon.rules import RULES
from stabmon.rules.tracking.issue_tracker import IssueTracker

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
    told = [getattr(owner, name, None) for owner in owners for name in HEADS]
    about: dict[str, Any] = {"heads": next((each for each in told if type(each) is int), None)}
    if not split:
        about |= {
            clean_name(name): list(each.shape)
            for name, each in module.named_parameters()
            if not is_lazy(each)
        }
    return about
