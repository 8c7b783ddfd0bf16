"""Watch a Lightning Trainer: events to monitor calls, and the Trainer's own loggers as sinks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from stabmon.config import StabilityConfig, load_config
from stabmon.engine.monitor import AttentionStabilityMonitor
from stabmon.integrations.earlier_issues import without_restored
from stabmon.integrations.ranks import settle
from stabmon.records import Reading, StabilityIssue
from stabmon.sinks import SINKS, Sink

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise ImportError('lightning is not installed: pip install "stabmon[lightning]"') from error

logger = logging.getLogger("stabmon")


class StabilityCallback(pl.Callback):
    """Add it to ``L.Trainer(callbacks=[...])``; nothing else changes.

    Records go to ``<trainer.log_dir>/stabmon``, with ``fast_dev_run`` and ``barebones`` nowhere.
    Scalars also reach every logger of the Trainer. The state is stored in each checkpoint and taken
    up again on resume.

    Args:
        config: a preset's name, a YAML file's path, or a
            :class:`~stabmon.config.schema.StabilityConfig`.
        log_every: sample every N-th optimizer step.
        sinks: names or sinks, instead of the configuration's and the Trainer's loggers.
        run_dir: instead of the Trainer's ``log_dir``.
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
        self._state: dict[str, Any] = {}
        self._global_step = 0
        self._in_step = False

    @property
    def issues(self) -> list[StabilityIssue]:
        """Every issue emitted so far, in all calls of ``fit()`` with this callback; empty before
        training.
        """
        return [*self._earlier, *([] if self.monitor is None else self.monitor.issues)]

    def close(self) -> None:
        """Leave the model as it was found. The Trainer's end and its exceptions do this."""
        if self.monitor is not None:
            self.monitor.close()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start watching; on a resume, go on where the checkpoint was."""
        self.close()
        self._earlier, self.monitor = self.issues, None
        dry = bool(
            getattr(trainer, "fast_dev_run", False) or trainer.barebones
        )  # modes in which Lightning leaves no file either
        run_dir = None if dry else self._run_dir or trainer.log_dir or trainer.default_root_dir
        try:
            sinks: list[str | Sink] = [
                each for each in self.config.sinks if not dry or _leaves_nothing(each)
            ]
            if not self._own_sinks and not dry:
                sinks += [_sink_of(each) for each in trainer.loggers]
            self.monitor = AttentionStabilityMonitor(
                pl_module,
                trainer.optimizers or None,
                [each.scheduler for each in trainer.lr_scheduler_configs],
                self.config,
                sinks=sinks,
                run_dir=run_dir,
                reduce_ranks=True,
                is_writer=trainer.is_global_zero,
                manual_steps=True,
                grad_scaler=getattr(trainer.precision_plugin, "scaler", None),
            )
            self.monitor.step = _steps_made(trainer)
            self._restore(self.monitor)
            self._earlier = without_restored(self._earlier, self.monitor.issues)
        except Exception:
            logger.exception("stabmon could not start watching; training goes on without it")
            self.monitor = None
        settle(self.monitor)
        self._global_step, self._in_step = trainer.global_step, False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Arm the capture at the first micro-batch of a sampled optimizer step."""
        if self.monitor is not None and not self._in_step:
            self._in_step = True
            self.monitor.begin_step()

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Take the loss, which Lightning has divided by the number of micro-batches."""
        if self.monitor is not None:
            self.monitor.add_loss(loss)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """Look at the gradients, before they are clipped."""
        if self.monitor is not None:
            self.monitor.before_optimizer_step(optimizer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Judge the step, if any optimizer stepped in the batch; end training where an intervention
        says so.
        """
        if self.monitor is not None and trainer.global_step != self._global_step:
            self._global_step, self._in_step = trainer.global_step, False
            self.monitor.on_step()
            if self.monitor.stop_reason is not None:
                trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop watching."""
        self.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Stop watching: training has failed."""
        self.close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop watching."""
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """What Lightning stores of us in a checkpoint."""
        try:
            return self._state if self.monitor is None else self.monitor.state_dict()
        except Exception:
            logger.exception("stabmon's state is not stored in this checkpoint")
            return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what Lightning has stored of us until training starts."""
        self._state = state_dict

    def _restore(self, monitor: AttentionStabilityMonitor) -> None:
        """Go on with what a checkpoint held; once, not in a later fit as well."""
        state, self._state = self._state, {}
        if state:
            try:
                monitor.load_state_dict(state)
            except ValueError as error:
                logger.warning("stabmon starts with an empty history: %s", error)


def _steps_made(trainer: pl.Trainer) -> int:
    """Batches in which an optimizer stepped: ``global_step`` counts each optimizer's steps under
    manual optimisation.
    """
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return min(trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.total.ready)


def _leaves_nothing(one: str | Sink) -> bool:
    """Whether a sink writes to no file or server that we know of."""
    ours = (
        one
        if isinstance(one, str)
        else next((name for name, cls in SINKS.items() if type(one) is cls), None)
    )
    return ours in ("console", None)


def _sink_of(one: Any) -> Sink:
    """The sink that writes to one of the Trainer's loggers."""
    kind = type(one).__name__
    if kind == "TensorBoardLogger":
        return SINKS["tensorboard"](writer=one.experiment)  # type: ignore[call-arg]
    if kind == "WandbLogger":
        return SINKS["wandb"](run=one.experiment)  # type: ignore[call-arg]
    return _LoggerSink(one)


class _LoggerSink(Sink):
    """Scalars to any Lightning logger."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        self._target.log_metrics(dict(scalars), step=reading.step)
