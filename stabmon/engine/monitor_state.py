"""Check and read a monitor's stored state: version, model and known issues."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from torch.nn.parameter import is_lazy

from stabmon._storage.stored_value import Stored
from stabmon._torch.forward_call import is_split
from stabmon._torch.ranks.share import RankShare
from stabmon.capture import clean_name
from stabmon.model_names import HEAD_COUNTS
from stabmon.records import StabilityIssue
from stabmon.rules import RULES
from stabmon.rules.tracking.issue_tracker import IssueTracker
from stabmon.signals import SIGNALS

logger = logging.getLogger("stabmon")

STATE_VERSION = 1
"""Version of the states written today; one without a version is older, and read the same way."""
OPTIONAL = frozenset(
    {"schedule", "step_length", "rate_jumps", "decay_jumps", "parts", "usual_updates"}
)
"""Keys of parts that states of earlier versions lack."""


class StoredPart(Protocol):
    """A part of a monitor with a state of its own."""

    def parse_state(self, state: Any) -> Callable[[], None]:
        """Read a stored state whole, and return a function that restores it."""
        ...


@dataclass(frozen=True)
class SavedState:
    """A stored state that has been read whole."""

    step: int
    last_reading: int
    """The step of the newest reading."""
    issues: Sequence[StabilityIssue]
    alarms: int | None
    """Alarms of the whole run; None in states that know only ``issues``."""
    restore: Sequence[Callable[[], None]]
    """Functions that each set one part of the monitor to its stored state; they do not raise."""
    share: RankShare
    """The layers and heads of the whole run that this rank held."""
    left_out: Sequence[str]
    """Everything that is no longer known, in words."""

    def restore_parts(self) -> None:
        """Set every part to its stored state, and warn of everything that was left out."""
        if self.left_out:
            logger.warning("Left out of the resumed state: %s", "; ".join(self.left_out))
        for restore in self.restore:
            restore()


def parse(
    state: Mapping[str, Any],
    model: nn.Module,
    tracker: IssueTracker,
    parts: Mapping[str, StoredPart],
) -> SavedState:
    """Read a stored state whole, and change nothing but ``tracker``.

    Args:
        state: the value that ``state_dict`` returned.
        model: this monitor's model.
        tracker: a new tracker, which takes the stored history and open issues.
        parts: the parts with a state of their own, by their key.

    Raises:
        ValueError: if it is no monitor's state, one of another model, or of a later version.
    """
    saved = Stored(state)
    _check_version(saved)
    try:
        tracker.load_state_dict(saved["tracker"], SIGNALS)
        issues = _known_issues(saved["issues"], tracker)
        alarms = saved.get("alarms", None).maybe(Stored.integer)
        step, last_reading = saved["step"].integer(), saved["last_reading"].integer()
        restore = [
            part.parse_state(saved.get(key, None) if key in OPTIONAL else saved[key])
            for key, part in parts.items()
        ]
        share = _parse_share(saved["share"]) if "share" in saved else RankShare()
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
    known = tracker.history.layers if layers is not None or share.is_whole else []
    check_model(model, known, layers)
    return SavedState(step, last_reading, issues, alarms, restore, share, saved.left_out)


def share_state(share: RankShare) -> dict[str, Any]:
    """Return what a rank holds as plain values, for :func:`parse`."""
    heads = {layer: list(span) for layer, span in share.heads.items()}
    elsewhere = sorted(share.elsewhere)
    return {
        "prefix": share.prefix,
        "heads": heads,
        "elsewhere": elsewhere,
        "is_staged": share.is_staged,
    }


def _parse_share(saved: Stored) -> RankShare:
    heads = {}
    for layer, span in saved["heads"].items():
        first, total = span.parts(2)
        heads[layer] = first.integer(), total.integer()
    elsewhere = frozenset(each.text() for each in saved["elsewhere"].parts())
    return RankShare(saved["prefix"].text(), heads, elsewhere, saved["is_staged"].flag())


def attention_of(model: nn.Module, layers: Sequence[str]) -> dict[str, Any]:
    """Describe a model's attention layers, to recognise the model on a resume.

    Args:
        model: the model.
        layers: names of its attention layers.

    Returns:
        By layer, the number of heads and the shapes of the weights, as far as modules show them.
    """
    modules = {
        clean_name(name) or type(module).__name__: module
        for name, module in model.named_modules(remove_duplicate=False)
    }
    split = is_split(model)
    return {layer: _describe(modules[layer], split) for layer in layers if layer in modules}


def check_model(
    model: nn.Module, layers: Sequence[str], saved: Mapping[str, Mapping[str, Any]] | None
) -> None:
    """Raise a ValueError where a state is not one of this model.

    Args:
        model: this model.
        layers: the state's attention layers.
        saved: the description by :func:`attention_of`; None in states older than version 1.
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
        for key, value in own.get(name, {}).items():
            if was.get(key, value) != value:
                words = f"{key} of {name} was {was[key]!r} and is {value!r}"
        if words:
            raise ValueError(
                f"a state of another model ({words}): give the state of a run on the same model"
            )


def _check_version(saved: Stored) -> None:
    """Raise a ValueError for a value that is no state, or one of a later version."""
    try:
        version = saved.get("version", 0).integer()
    except ValueError as error:
        raise ValueError(f"no monitor's state ({error}): give what state_dict() returned") from None
    if version > STATE_VERSION:
        raise ValueError(
            f"a state of version {version}, but this stabmon reads up to {STATE_VERSION}: update "
            "stabmon"
        )


def _known_issues(saved: Stored, tracker: IssueTracker) -> list[StabilityIssue]:
    """Return the stored issues that a present rule knows; leave out the others."""
    known = {issue.issue_type for issue in tracker.open_issues}
    issues = []
    for each in saved.parts():
        issue = StabilityIssue.from_dict(each)
        if issue.issue_type in known or issue.issue_type in RULES:
            issues.append(issue)
        else:
            each.leave_out(f"no issue {issue.issue_type!r} is known any more")
    return issues


def _describe(module: nn.Module, split: bool) -> dict[str, Any]:
    owners = (module, getattr(module, "config", None))
    counts = [getattr(owner, name, None) for owner in owners for name in HEAD_COUNTS]
    found: dict[str, Any] = {"heads": next((each for each in counts if type(each) is int), None)}
    if not split:  # a rank's shard has another shape after a resume on more or fewer ranks
        found |= {
            clean_name(name): list(each.shape)
            for name, each in module.named_parameters()
            if not is_lazy(each)
        }
    return found
