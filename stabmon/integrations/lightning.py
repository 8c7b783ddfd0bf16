"""Watch a Lightning Trainer by a callback, with its own loggers as sinks."""

from __future__ import annotations

import logging
import math
from typing import Any

from torch import Tensor

from stabmon._torch.isolation import random_state_kept
from stabmon.config import StabilityConfig
from stabmon.engine.monitor import AttentionStabilityMonitor
from stabmon.integrations.base import StabilityCallbackBase
from stabmon.sinks import SINKS, Sink
from stabmon.sinks.dashboards.scalar_log import ScalarLog

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise ImportError('lightning is not installed: pip install "stabmon[lightning]"') from error

logger = logging.getLogger("stabmon")


class StabilityCallback(StabilityCallbackBase, pl.Callback):
    """Callback for ``L.Trainer(callbacks=[...])``; nothing else changes.

    Records go to ``<trainer.log_dir>/stabmon``, with ``fast_dev_run`` and ``barebones`` nowhere.
    Scalars also reach every logger of the Trainer. The state is stored in each checkpoint and
    restored on a resume.

    Args:
        config: a preset's name, a YAML file's path, or a
            :class:`~stabmon.config.schema.StabilityConfig`.
        log_every: sample every N-th optimizer step of a quiet run, and more while something moves.
        sinks: names or sinks, instead of the configuration's and the Trainer's loggers.
        run_dir: instead of the Trainer's ``log_dir``.
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

    _state: dict[str, Any] | None = None
    """The state in a loaded checkpoint, until training starts."""
    _global_step = 0
    _in_step = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start watching; on a resume, go on from the checkpoint."""
        # Lightning reports every end of a training, also by an exception
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if not self._takes(trainer, callbacks, lambda earlier: earlier is not trainer):
            return
        # modes in which Lightning leaves no file either
        dry = bool(getattr(trainer, "fast_dev_run", False) or trainer.barebones)

        def make() -> AttentionStabilityMonitor:
            sinks: list[str | Sink] = [
                each for each in self.config.sinks if not dry or _writes_nowhere(each)
            ]
            if not self._own_sinks and not dry:
                sinks += [_sink_of(each, self.config) for each in trainer.loggers]
            run_dir = None if dry else self._run_dir or trainer.log_dir or trainer.default_root_dir
            monitor = AttentionStabilityMonitor(
                pl_module,
                trainer.optimizers or None,
                [each.scheduler for each in trainer.lr_scheduler_configs],
                self.config,
                sinks=sinks,
                run_dir=run_dir,
                on_issue=self._on_issue,
                reduce_ranks=True,
                is_writer=trainer.is_global_zero,
                manual_steps=True,
                grad_scaler=getattr(trainer.precision_plugin, "scaler", None),
                framework="lightning",
            )
            monitor.step = _steps_made(trainer)
            return monitor

        self._start(trainer, make, self._restore)
        if self.monitor is not None:
            self._expect_end(trainer, self.monitor)
        self._global_step, self._in_step = trainer.global_step, False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin an optimizer step at its first micro-batch."""
        if self.monitor is not None and trainer is self._run and not self._in_step:
            self._in_step = True
            self.monitor.begin_step()

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Add the loss, which Lightning has divided by the number of micro-batches."""
        if self.monitor is not None and trainer is self._run:
            self.monitor.add_loss(loss)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """Inspect the gradients, before they are clipped."""
        if self.monitor is not None and trainer is self._run:
            self.monitor.before_optimizer_step(optimizer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Judge the step if an optimizer stepped in the batch; stop if asked to."""
        if self.monitor is None or trainer is not self._run:
            return
        if trainer.global_step != self._global_step:
            self._global_step, self._in_step = trainer.global_step, False
            self.monitor.on_step()
            if self.monitor.stop_reason is not None:
                trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop watching."""
        self._end(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Stop watching: training has failed."""
        self._end(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop watching."""
        self._end(trainer)

    def _end(self, trainer: pl.Trainer) -> None:
        if trainer is self._run:
            self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the monitor's state, for Lightning's checkpoint."""
        try:
            return (self._state or {}) if self.monitor is None else self.monitor.state_dict()
        except Exception:
            logger.exception("stabmon's state is not stored in this checkpoint")
            return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state in Lightning's checkpoint until training starts."""
        self._state = state_dict

    @staticmethod
    def _expect_end(trainer: pl.Trainer, monitor: AttentionStabilityMonitor) -> None:
        """Warn if no step until the end is sampled, where the end is known."""
        if getattr(trainer, "fast_dev_run", False):
            monitor.expect_end(None)
            return
        try:
            last_step = trainer.estimated_stepping_batches
        except Exception:  # under some schedules of accumulation Lightning refuses to say
            return
        if math.isfinite(last_step):
            monitor.expect_end(int(last_step))

    def _restore(self, monitor: AttentionStabilityMonitor) -> None:
        """Set a monitor to the state in a checkpoint; once, not in a later fit as well."""
        state, self._state = self._state, None
        if not state and monitor.step > 0:
            logger.warning(
                "stabmon starts with an empty history: the checkpoint has no state of it"
            )
        if state:
            try:
                monitor.load_state_dict(state)
            except ValueError as error:
                logger.warning("stabmon starts with an empty history: %s", error)


def _steps_made(trainer: pl.Trainer) -> int:
    """Return the number of batches in which an optimizer stepped.

    Under manual optimisation ``global_step`` counts each optimizer's steps.
    """
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return min(trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.total.ready)


def _writes_nowhere(sink: str | Sink) -> bool:
    """Return whether a sink writes to no file or server, as far as known."""
    name = (
        sink
        if isinstance(sink, str)
        else next((name for name, cls in SINKS.items() if type(sink) is cls), None)
    )
    return name in ("console", None)


def _sink_of(target: Any, config: StabilityConfig) -> Sink:
    """Return the sink that writes to one of the Trainer's loggers."""
    kinds = {cls.__name__ for cls in type(target).__mro__}
    if "TensorBoardLogger" in kinds:
        return config.make_sink("tensorboard", writer=target.experiment)
    if "WandbLogger" in kinds:
        return config.make_sink("wandb", run=target.experiment)
    # a table has no panels that many layers would crowd
    return LoggerSink(target, every_layer=config.per_head or "CSVLogger" in kinds)


class LoggerSink(ScalarLog):
    """Scalars to any Lightning logger, in the two calls that the Trainer makes itself.

    Args:
        target: the logger.
        every_layer: log the scalars of every layer of a model of many.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     logger = CSVLogger(folder)
        ...     LoggerSink(logger).log(3, {"a": 1.0})
        ...     logger.experiment.metrics_keys
        ['a', 'step']
    """

    def __init__(self, target: Any, *, every_layer: bool = False) -> None:
        super().__init__(every_layer=every_layer)
        self._target = target
        self.name = type(target).__name__

    def log(self, step: int, scalars: dict[str, float]) -> None:
        with random_state_kept():
            self._target.log_metrics(scalars, step=step)
            self._target.save()
