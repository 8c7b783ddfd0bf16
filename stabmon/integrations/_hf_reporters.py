"""Write scalars to the reporters of the Hugging Face Trainer, in each one's own way."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils

from stabmon._torch.isolation import random_state_kept
from stabmon.config import StabilityConfig
from stabmon.sinks import Sink
from stabmon.sinks.dashboards.panels import LAYERS
from stabmon.sinks.dashboards.scalar_log import ScalarLog

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


class ReporterSink(ScalarLog):
    """Scalars through a reporter's own ``on_log``, as if the Trainer had logged them.

    Other callbacks get nothing, so that no progress bar prints them. The reporter is given copies
    of the Trainer's state, at the sampled step, and of its control, so that it can stop nothing.

    Args:
        reporter: the callback.
        args: the Trainer's arguments.
        state: its state.
        every_layer: log the scalars of every layer of a model of many.
        **given: further arguments of the Trainer's events, such as ``model``.
    """

    def __init__(
        self,
        reporter: Any,
        args: TrainingArguments,
        state: TrainerState,
        *,
        every_layer: bool = False,
        **given: Any,
    ) -> None:
        super().__init__(every_layer=every_layer)
        self._reporter, self._args, self._state, self._given = reporter, args, state, given
        self.name = type(reporter).__name__

    def log(self, step: int, scalars: dict[str, float]) -> None:
        with random_state_kept():
            self._log(step, scalars)

    def _log(self, step: int, scalars: dict[str, float]) -> None:
        state, control = copy.copy(self._state), TrainerControl()
        state.global_step = step
        self._reporter.on_log(self._args, state, control, logs=scalars, **self._given)


class DvcliveSink(ReporterSink):
    """Scalars beside the Trainer's in DVCLive's step, which ``on_log`` would move on."""

    def _log(self, step: int, scalars: dict[str, float]) -> None:
        live = getattr(self._reporter, "live", None)
        if live is None:
            super()._log(step, scalars)
            return
        for name, value in {**scalars, "stability/step": step}.items():
            live.log_metric(name, value)


class TrackioSink(ReporterSink):
    """Scalars at Trackio's newest step, where ``on_log`` would use up the next."""

    def _log(self, step: int, scalars: dict[str, float]) -> None:
        trackio = import_module("trackio")
        # context_vars is internal, and Run._next_step has no public name (checked with trackio
        # 0.43); without either, the Trainer's own rows move on by one at each sample
        variables = getattr(trackio, "context_vars", None)
        run = variables.current_run.get() if variables is not None else None
        following = getattr(run, "_next_step", None)
        if following is None:
            super()._log(step, scalars)
            return
        rewritten: dict[str, float] = integration_utils.rewrite_logs(scalars)
        trackio.log(rewritten | {"train/global_step": step}, step=max(following - 1, 0))


class KubeflowSink(ReporterSink):
    """Scalars of the whole model alone: they become a bounded list in a job's status."""

    def _log(self, step: int, scalars: dict[str, float]) -> None:
        super()._log(step, model_wide(scalars))


_OWN_WAYS = {
    "DVCLiveCallback": DvcliveSink,
    "TrackioCallback": TrackioSink,
    "KubeflowCallback": KubeflowSink,
}
"""Sink of each reporter whose ``on_log`` would disturb what its user logs there."""


def model_wide(scalars: Mapping[str, float]) -> dict[str, float]:
    """Return the scalars that are not of a single layer."""
    return {name: value for name, value in scalars.items() if not name.startswith(LAYERS)}


def reporters_of(callbacks: Sequence[Any]) -> list[Any]:
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
        name, attribute = next((_SINKS[each] for each in classes if each in _SINKS), ("", ""))
        target = getattr(reporter, attribute, True) if name else None
        if name == "tensorboard" and target is not None:
            if name not in config.sinks:
                found.append(config.make_sink(name, writer=target))
        elif name in ("", "tensorboard"):
            way = next((_OWN_WAYS[each] for each in classes if each in _OWN_WAYS), ReporterSink)
            found.append(way(reporter, args, state, every_layer=config.per_head, **given))
        elif target is not None and name not in config.sinks:
            found.append(config.make_sink(name))
    return found
