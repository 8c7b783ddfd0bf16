"""Watch a Hugging Face Trainer by a callback, with its reporters as sinks."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from stabmon._storage.atomic_write import write_text
from stabmon.engine.monitor import AttentionStabilityMonitor
from stabmon.integrations.base import StabilityCallbackBase
from stabmon.records import Reading
from stabmon.sinks import Sink

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    from stabmon.integrations._hf_frames import is_training, sibling_callbacks, trainer_local
    from stabmon.integrations._hf_reporters import model_wide, sinks_of
except ImportError as error:
    raise ImportError(
        'transformers is not installed: pip install "stabmon[transformers]"'
    ) from error

logger = logging.getLogger("stabmon")
_STATE = "stabmon_state.json"


class StabilityCallback(StabilityCallbackBase, TrainerCallback):
    """Callback for ``Trainer(callbacks=[...])``; nothing else changes.

    Records go to ``<output_dir>/stabmon``. Scalars also reach every reporter in ``report_to`` and,
    model-wide ones, ``trainer.state.log_history``. The state is stored in each checkpoint and
    restored on a resume.

    Args:
        config: a preset's name, a YAML file's path, or a
            :class:`~stabmon.config.schema.StabilityConfig`.
        log_every: sample every N-th optimizer step of a quiet run, and more while something moves.
        sinks: names or sinks, instead of the configuration's and the Trainer's reporters.
        run_dir: instead of the Trainer's ``output_dir``.
        on_issue: a function, called with each issue on the process that writes the records.
        per_head: True for the values of every head on the dashboards.
        **overrides: other fields of the configuration.

    Raises:
        ValueError: for an invalid configuration, naming the value and the fix.
        TypeError: if ``on_issue`` cannot be called.

    Example:
        >>> callback = StabilityCallback("guard", log_every=50)  # Trainer(callbacks=[callback])
        >>> callback.config.log_every, callback.issues
        (50, [])
    """

    _ahead: int | None = None
    """The step whose state was written before its checkpoint, and is to be moved into it."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Start watching; on a resume, go on from the checkpoint."""
        siblings = sibling_callbacks()
        if not self._takes(state, siblings, is_training):
            return

        def make() -> AttentionStabilityMonitor:
            sinks: list[str | Sink] = list(self.config.sinks)
            if not self._own_sinks:
                sinks += sinks_of(siblings, self.config, args, state, model=model, **kwargs)
            monitor = AttentionStabilityMonitor(
                model,
                kwargs.get("optimizer"),
                kwargs.get("lr_scheduler"),
                self.config,
                sinks=[*sinks, LogHistory(state)],
                run_dir=self._run_dir or args.output_dir,
                on_issue=self._on_issue,
                reduce_ranks=True,
                is_writer=state.is_world_process_zero,
                manual_steps=True,
                framework="transformers",
            )
            monitor.step = state.global_step
            return monitor

        self._start(state, make, lambda monitor: _restore(monitor, args, state))
        if self.monitor is not None:
            self.monitor.expect_end(state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin an optimizer step."""
        if self.monitor is not None and self._heeds("step begin", state):
            self.monitor.step = state.global_step
            self.monitor.begin_step()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add a micro-batch's loss."""
        if self._heeds("substep", state):
            self._add_loss()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the last micro-batch's loss and inspect the gradients."""
        if self.monitor is not None and self._heeds("optimizer", state):
            self._add_loss()
            self.monitor.before_optimizer_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Judge the step; end training where an intervention stops it."""
        if self.monitor is not None and self._heeds("step end", state):
            self.monitor.on_step()
            if self.monitor.stop_reason is not None:
                control.should_training_stop = True
            self._store_ahead(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Store the monitor's state before a checkpoint of the epoch's end."""
        if self.monitor is not None and self._heeds("epoch end", state):
            self._store_ahead(args, state, control)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the monitor's state into the checkpoint just written."""
        if not state.is_world_process_zero:
            return
        if self.monitor is not None and self._heeds("save", state):
            folder = _checkpoint(args, state)
            try:
                if not folder.is_dir():
                    return
                if self._ahead == state.global_step:
                    _ahead_of(args).replace(folder / _STATE)
                else:
                    write_text(folder / _STATE, json.dumps(self.monitor.state_dict()))
                self._ahead = None
            except Exception as error:
                logger.warning("stabmon's state was not stored in %s: %s", folder, error)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop watching."""
        if state is self._run:
            self.close()

    def _store_ahead(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        """Write the state before the Trainer writes a checkpoint, if it is about to.

        A run that is killed between the checkpoint and the move into it finds the state there.
        """
        if self.monitor is None or not (control.should_save and state.is_world_process_zero):
            return
        try:
            _ahead_of(args).parent.mkdir(parents=True, exist_ok=True)
            write_text(_ahead_of(args), json.dumps(self.monitor.state_dict()))
            self._ahead = state.global_step
        except Exception as error:  # it is tried again once the checkpoint is written
            logger.info("stabmon's state is stored after the checkpoint: %s", error)

    def _add_loss(self) -> None:
        """Add a micro-batch's loss as it was differentiated, where it is found."""
        loss = trainer_local("tr_loss_step") if self.monitor is not None else None
        if self.monitor is not None and isinstance(loss, Tensor):
            self.monitor.add_loss(loss)


def _restore(
    monitor: AttentionStabilityMonitor, args: TrainingArguments, state: TrainerState
) -> None:
    """Set a monitor to the state in the checkpoint of a resumed training."""
    if state.global_step == 0:
        return
    resumed = trainer_local("resume_from_checkpoint")
    folders = [*([Path(resumed)] if isinstance(resumed, str) else []), _checkpoint(args, state)]
    for path in (*(folder / _STATE for folder in folders), _ahead_of(args)):
        if path.is_file():
            try:
                saved = json.loads(path.read_text())
                if path == _ahead_of(args) and saved["step"] != state.global_step:
                    continue  # of a checkpoint that was never written
                monitor.load_state_dict(saved)
            except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
                logger.warning(
                    "stabmon starts with an empty history: %s could not be read (%s)",
                    path,
                    error,
                )
            monitor.step = state.global_step
            return
    logger.warning("stabmon starts with an empty history: no %s in %s", _STATE, folders[0])


def _ahead_of(args: TrainingArguments) -> Path:
    """Return the file of a state that is to be moved into the next checkpoint."""
    return Path(args.output_dir or ".") / f"{_STATE}.next"


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


class LogHistory(Sink):
    """Model-wide scalars as entries of the Trainer's ``log_history``.

    They are written there since a callback cannot reach ``Trainer.log``.

    Args:
        state: the Trainer's state.

    Example:
        >>> state = TrainerState(epoch=0.5)
        >>> LogHistory(state).write_reading(Reading(step=3, loss=None, layers={}), {"a": 1.0})
        >>> state.log_history
        [{'a': 1.0, 'epoch': 0.5, 'step': 3}]
    """

    def __init__(self, state: TrainerState) -> None:
        self._state = state

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        position = {"epoch": self._state.epoch or 0.0, "step": reading.step}
        self._state.log_history.append(model_wide(scalars) | position)
