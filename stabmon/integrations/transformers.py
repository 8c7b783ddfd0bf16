"""Watch a Hugging Face Trainer: events to monitor calls, and the Trainer's own reporters as
sinks.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from stabmon._storage.atomic_write import write_text
from stabmon.config import StabilityConfig, load_config
from stabmon.engine.monitor import AttentionStabilityMonitor
from stabmon.integrations.earlier_issues import without_restored
from stabmon.integrations.ranks import settle
from stabmon.records import Reading, StabilityIssue
from stabmon.sinks import SINKS, Sink

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import CallbackHandler
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError(
        'transformers is not installed: pip install "stabmon[transformers]"'
    ) from error

logger = logging.getLogger("stabmon")
_STATE = "stabmon_state.json"


class StabilityCallback(TrainerCallback):
    """Add it to ``Trainer(callbacks=[...])``; nothing else changes.

    Records go to ``<output_dir>/stabmon``. Scalars also reach what ``report_to`` names
    (TensorBoard, W&B, MLflow) and, model-wide ones, ``trainer.state.log_history``. The state is
    stored in each checkpoint and taken up again on resume.

    Args:
        config: a preset's name, a YAML file's path, or a
            :class:`~stabmon.config.schema.StabilityConfig`.
        log_every: sample every N-th optimizer step.
        sinks: names or sinks, instead of the configuration's and the Trainer's reporters.
        run_dir: instead of the Trainer's ``output_dir``.
        **overrides: other fields of the configuration.

    Raises:
        ValueError: for a configuration that cannot be, naming the value and the mend.
    """

    def __init__(
        self,
        config: str | Path | StabilityConfig | None = "observe",
        *,
        log_every: int | None = None,
        sinks: list[str | Sink] | None = None,
        run_dir: str | Path | None = None,
        **overrides: Any,
    ) -> None:
        self.config = load_config(config, log_every=log_every, sinks=sinks, **overrides)
        self.monitor: AttentionStabilityMonitor | None = None
        self._earlier: list[StabilityIssue] = []
        self._own_sinks = sinks is not None
        self._run_dir = run_dir

    @property
    def issues(self) -> list[StabilityIssue]:
        """Every issue emitted so far, in all calls of ``train()`` with this callback; empty before
        training.
        """
        return [*self._earlier, *([] if self.monitor is None else self.monitor.issues)]

    def close(self) -> None:
        """Leave the model as it was found. Training's end does this; after an exception outside a
        forward, nobody else does.
        """
        if self.monitor is not None:
            self.monitor.close()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Start watching; on a resume, go on where the checkpoint was."""
        self.close()
        self._earlier, self.monitor = self.issues, None
        try:
            sinks: list[str | Sink] = list(self.config.sinks)
            if not self._own_sinks:
                sinks += _reporters(_siblings(), sinks)
            self.monitor = AttentionStabilityMonitor(
                model,
                kwargs.get("optimizer"),
                kwargs.get("lr_scheduler"),
                self.config,
                sinks=[*sinks, LogHistory(state)],
                run_dir=self._run_dir or args.output_dir,
                reduce_ranks=True,
                is_writer=state.is_world_process_zero,
                manual_steps=True,
            )
            self.monitor.step = state.global_step
            self._restore(args, state)
            self._earlier = without_restored(self._earlier, self.monitor.issues)
        except Exception:
            logger.exception("stabmon could not start watching; training goes on without it")
            self.monitor = None
        settle(self.monitor)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Arm the capture, if this optimizer step is sampled."""
        if self.monitor is not None:
            self.monitor.step = state.global_step
            self.monitor.begin_step()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take a micro-batch's loss."""
        self._take_loss()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the last micro-batch's loss and look at the gradients."""
        if self.monitor is not None:
            self._take_loss()
            self.monitor.before_optimizer_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Judge the step; end training where an intervention says so."""
        if self.monitor is not None:
            self.monitor.on_step()
            if self.monitor.stop_reason is not None:
                control.should_training_stop = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Store the monitor's state beside the Trainer's, in the checkpoint just written."""
        if self.monitor is not None and state.is_world_process_zero:
            folder = _checkpoint(args, state)
            try:
                if folder.is_dir():
                    write_text(folder / _STATE, json.dumps(self.monitor.state_dict()))
            except Exception as error:
                logger.warning("stabmon's state was not stored in %s: %s", folder, error)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop watching."""
        self.close()

    def _take_loss(self) -> None:
        """Take a micro-batch's loss as the Trainer differentiated it; where it cannot be had, that
        of the model's output serves.
        """
        loss = _local_of_trainer("tr_loss_step") if self.monitor is not None else None
        if self.monitor is not None and isinstance(loss, Tensor):
            self.monitor.add_loss(loss)

    def _restore(self, args: TrainingArguments, state: TrainerState) -> None:
        if state.global_step == 0 or self.monitor is None:
            return
        resumed = _local_of_trainer("resume_from_checkpoint")
        folders = [*([Path(resumed)] if isinstance(resumed, str) else []), _checkpoint(args, state)]
        for path in (folder / _STATE for folder in folders):
            if path.is_file():
                try:
                    self.monitor.load_state_dict(json.loads(path.read_text()))
                except (OSError, ValueError, RecursionError) as error:
                    logger.warning(
                        "stabmon starts with an empty history: %s could not be read (%s)",
                        path,
                        error,
                    )
                self.monitor.step = state.global_step
                return
        logger.warning("stabmon starts with an empty history: no %s in %s", _STATE, folders[0])


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _siblings() -> list[Any]:
    """The Trainer's other callbacks, from the handler that is calling us; empty where there is none
    to be found.
    """
    frame = sys._getframe(1)
    for _ in range(8):
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            return list(handler.callbacks)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return []


def _local_of_trainer(name: str) -> Any:
    """What a function of the Trainer's that is calling us has under a name; None where there is
    none such.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if (
            frame.f_globals.get("__name__") == "transformers.trainer"
            and name in frame.f_code.co_varnames
        ):
            variables = frame.f_locals
            value = variables.get(name)
            if isinstance(
                variables, dict
            ):  # until Python 3.12 a copy that lives as long as the frame, and would keep a batch
                variables.clear()
            return value
        frame = frame.f_back
    return None


def _reporters(callbacks: list[Any], present: list[str | Sink]) -> list[str | Sink]:
    """A sink for each of the Trainer's reporters that stabmon knows, writing to the reporter's own
    run.
    """
    names = {each for each in present if isinstance(each, str)}
    found: list[str | Sink] = []
    for callback in callbacks:
        kind = type(callback).__name__
        if (
            kind == "TensorBoardCallback"
            and "tensorboard" not in names
            and callback.tb_writer is not None
        ):
            found.append(SINKS["tensorboard"](writer=callback.tb_writer))  # type: ignore[call-arg]
        elif (
            kind == "WandbCallback"
            and "wandb" not in names
            and getattr(callback, "_wandb", True) is not None
        ):
            found.append(SINKS["wandb"]())
        elif (
            kind == "MLflowCallback"
            and "mlflow" not in names
            and getattr(callback, "_ml_flow", True) is not None
        ):
            found.append(SINKS["mlflow"]())
    return found


class LogHistory(Sink):
    """The model-wide scalars as entries of ``log_history``; written there, since a callback cannot
    reach ``Trainer.log``.
    """

    def __init__(self, state: TrainerState) -> None:
        self._state = state

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        wide = {
            name: value
            for name, value in scalars.items()
            if not name.startswith("attention_layers/")
        }
        self._state.log_history.append(
            wide | {"epoch": self._state.epoch or 0.0, "step": reading.step}
        )
