"""Write scalars to the reporters of the Hugging Face Trainer, in each one's own way."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils

from stabmon.config import StabilityConfig
from stabmon.records import Reading
from stabmon.sinks import Sink

_SINKS = {
    "TensorBoardCallback": ("tensorboard", "tb_writer"),
    "WandbCallback": ("wandb", "_wandb"),
    "MLflowCallback": ("mlflow", "_ml_flow"),
}
"""Sink of each reporter that has one, and its attribute that is None while it is switched off.

``_wandb`` and ``_ml_flow`` are private: the imported packages, None where an environment variable
switches the reporter off (checked with transformers 5.23). Under other names, stabmon would open a
run that the reporter does not want.
"""
_TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "neptune", "swanlab", "trackio")
"""Packages whose own callbacks for the Trainer are reporters, beside those of ``report_to``."""


class ReporterSink(Sink):
    """Scalars through a reporter's own ``on_log``, as if the Trainer had logged them.

    Other callbacks get nothing, so that no progress bar prints them. The reporter is given copies
    of the Trainer's state, at the sampled step, and of its control, so that it can stop nothing.

    Args:
        reporter: the callback.
        args: the Trainer's arguments.
        state: its state.
        **given: further arguments of the Trainer's events, such as ``model``.
    """

    def __init__(
        self, reporter: TrainerCallback, args: TrainingArguments, state: TrainerState, **given: Any
    ) -> None:
        self._reporter, self._args, self._state, self._given = reporter, args, state, given
        self.name = type(reporter).__name__

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        state = copy.copy(self._state)
        state.global_step = reading.step
        self.log(state, dict(scalars))

    def log(self, state: TrainerState, scalars: dict[str, float]) -> None:
        """Log scalars at ``state.global_step``."""
        self._reporter.on_log(
            self._args, state, TrainerControl(), logs=scalars, **self._given
        )


def reporters_of(callbacks: Sequence[Any]) -> list[TrainerCallback]:
    """Return the callbacks that report scalars somewhere: those of ``report_to``, or like them."""
    # the mapping from names in report_to to callbacks, which other packages may extend (checked
    # with transformers 5.23); gone, only reporters with a sink of their own get scalars
    known = tuple(getattr(integration_utils, "INTEGRATION_TO_CALLBACK", {}).values())
    return [
        each
        for each in callbacks
        if isinstance(each, known) or type(each).__module__.partition(".")[0] in _TRACKERS
        if type(each).on_log is not TrainerCallback.on_log
    ]


def sinks_of(
    callbacks: Sequence[Any],
    config: StabilityConfig,
    args: TrainingArguments,
    state: TrainerState,
    **given: Any,
) -> list[Sink]:
    """Return a sink for each of the Trainer's reporters, for the same run.

    Args:
        callbacks: the Trainer's callbacks.
        config: the settings; a sink that it names is not made again.
        args: the Trainer's arguments.
        state: its state.
        **given: further arguments of the Trainer's events.
    """
    found: list[Sink] = []
    for reporter in reporters_of(callbacks):
        classes = [cls.__name__ for cls in type(reporter).__mro__]
        kind = next((name for name in classes if name in _SINKS), None)
        if kind is None:
            found.append(ReporterSink(reporter, args, state, **given))
            continue
        name, attribute = _SINKS[kind]
        if name not in config.sinks and getattr(reporter, attribute, True) is not None:
            own = {"writer": reporter.tb_writer} if name == "tensorboard" else {}
            found.append(config.make_sink(name, **own))
    return found
