"""Controllers' effects as time series: in training, evaluation and generation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from stabmon.controllers.attach import find_controllers
from stabmon.controllers.base import Controller
from stabmon.controllers.divergence import row_means
from stabmon.controllers.plots import grid, series
from stabmon.records import AttentionCall, Reading, StabilityIssue
from stabmon.rules.base import RULES
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.issue_tracker import IssueTracker
from stabmon.signals.accumulator import Measurements, to_host
from stabmon.sinks.base import SINKS, Sink
from stabmon.sinks.group import SinkGroup
from stabmon.sinks.scalars import dashboard_scalars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("stabmon")
SIGNALS = ("attention_entropy", "normalized_entropy", "max_logit", "max_probability", "sink_mass")
"""Default signals of the modified attention."""


class ControllerWatch:
    """Measure every n-th forward of a controlled model and change nothing.

    It measures from entering the context to leaving it. A reading holds for each layer and head:
    ``controller_kl`` and ``attention_variance`` (see
    :func:`stabmon.controllers.divergence.row_means`), ``mean_adjustment`` (mean absolute bias of
    the keys, in nats), ``query_gain`` (mean gain of the queries), ``linear_share``, and signals of
    the modified attention. A reading's step is the number of the forward: in training a
    micro-batch, in ``generate`` a token.

    Args:
        model: the controlled model, as it is called.
        every: measure every n-th forward, the first included.
        training_only: leave forwards of a model in evaluation mode alone, and do not count them.
        run_dir: sinks write to ``<run_dir>/stabmon``; None for nowhere.
        sinks: names of sinks, or sinks.
        signals: names of signals of the modified attention.

    Attributes:
        readings: all readings, oldest first.
        issues: the rules' findings in them.
        errors: errors of the watch itself, which never reach the model.

    Raises:
        ValueError: if the model has no controllers, or a name or number is wrong.

    Example:
        >>> from stabmon.controllers import attach_controllers
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16))
        >>> controllers = attach_controllers(model, "linear_ramp")
        >>> with ControllerWatch(model) as watch:
        ...     output = model(torch.tensor([[1, 2, 3]]))
        >>> watch.readings[0].layers["h.1.attn"]["linear_share"]
        array([0.5, 0.5])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 1,
        training_only: bool = False,
        run_dir: str | Path | None = None,
        sinks: Sequence[str | Sink] = ("jsonl",),
        signals: Sequence[str] = SIGNALS,
    ) -> None:
        if every < 1:
            raise ValueError(f"every {every!r}: give at least 1")
        self._members = find_controllers(model)
        if not self._members:
            raise ValueError(
                "the model has no controllers: put some into it with attach_controllers(model, "
                "...) first"
            )
        self.readings: list[Reading] = []
        self.issues: list[StabilityIssue] = []
        self.errors: list[str] = []
        self._model, self._every, self._training_only = model, every, training_only
        self._folder = None if run_dir is None else Path(run_dir) / "stabmon"
        self._given_sinks = [SINKS[each]() if isinstance(each, str) else each for each in sinks]
        self._sinks = SinkGroup([])
        self._tracker = IssueTracker(
            [rule() for _, rule in RULES.items()], history=History(256), cooldown_steps=0
        )
        self._measured = Measurements(signals)
        self._own: dict[str, list[dict[str, Tensor]]] = {}
        self._handles: list[Any] = []
        self._forwards = 0

    def __enter__(self) -> ControllerWatch:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        self._sinks = SinkGroup(self._given_sinks)
        self._sinks.open(
            self._folder,
            {"what": "controllers", "every": self._every, "layers": list(self._members)},
        )
        self._handles = [
            self._model.register_forward_pre_hook(self._begin),
            self._model.register_forward_hook(self._end),
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._listen(None)
        self._sinks.close()

    def plot_grid(self, signal: str = "controller_kl", path: str | Path | None = None) -> Figure:
        """Draw one quantity of every head over the forwards.

        Args:
            signal: the quantity, a name in the readings' layers.
            path: file to save the figure to; None to save nothing.

        Returns:
            A matplotlib figure, one panel per layer.

        Example:
            >>> from stabmon.controllers import attach_controllers
            >>> from transformers import GPT2Config, GPT2Model
            >>> model = GPT2Model(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16))
            >>> controllers = attach_controllers(model, "linear_ramp")
            >>> with ControllerWatch(model) as watch:
            ...     output = model(torch.tensor([[1, 2, 3]]))
            >>> len(watch.plot_grid("linear_share").axes) > 0
            True
        """
        return grid(self.readings, signal, path)

    def plot_series(self, path: str | Path | None = None) -> Figure:
        """Draw every quantity over the forwards, one line per layer.

        Args:
            path: file to save the figure to; None to save nothing.

        Returns:
            A matplotlib figure, one panel per quantity.

        Example:
            >>> from stabmon.controllers import attach_controllers
            >>> from transformers import GPT2Config, GPT2Model
            >>> model = GPT2Model(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16))
            >>> controllers = attach_controllers(model, "linear_ramp")
            >>> with ControllerWatch(model) as watch:
            ...     output = model(torch.tensor([[1, 2, 3]]))
            >>> len(watch.plot_series().axes) > 0
            True
        """
        return series(self.readings, path)

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._own = {}
        if self._training_only and not module.training:
            return
        self._forwards += 1
        sampled = (self._forwards - 1) % self._every == 0
        self._measured.start(self._forwards)
        self._listen(self._measure if sampled else None)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._listen(None)
        if not self._own:
            return
        try:
            self._conclude(output)
        except Exception as error:
            self._failed(error)

    def _listen(self, listener: Any) -> None:
        for member in self._members.values():
            member.listener = listener

    def _measure(
        self, controller: Controller, original: AttentionCall, modified: AttentionCall
    ) -> None:
        try:
            self._measured.add(modified)
            call, heads = controller.call, controller.site.heads
            share = controller.linear_share()
            ones = torch.ones(heads)
            own = row_means(original, modified)
            own["mean_adjustment"] = (
                0 * ones if call.new_bias is None else call.new_bias.abs().mean(dim=(0, 2))
            )
            own["query_gain"] = ones if call.gain is None else call.gain.mean(dim=(0, 2))
            own["linear_share"] = share if isinstance(share, Tensor) else ones * (share or 0.0)
            self._own.setdefault(controller.site.name, []).append(own)
        except Exception as error:
            self._failed(error)

    def _conclude(self, output: Any) -> None:
        layers: dict[str, dict[str, np.ndarray]] = {
            name: dict(found) for name, found in to_host(self._measured.sums).items()
        }
        for name, calls in self._own.items():
            for quantity in calls[0]:
                mean = torch.stack([call[quantity].double().cpu() for call in calls]).mean(0)
                layers.setdefault(name, {})[quantity] = mean.numpy()
        loss = getattr(output, "loss", None)
        value = float(loss.detach()) if isinstance(loss, Tensor) and loss.numel() == 1 else None
        reading = Reading(
            step=self._forwards, loss=value, layers=layers, info=dict(self._measured.info)
        )
        self.readings.append(reading)
        issues = self._tracker.update(reading)
        self.issues += issues
        alarms = sum(issue.is_alarm and issue.state != "closed" for issue in self.issues)
        self._sinks.write_reading(
            reading, dashboard_scalars(reading, self._tracker.open_issues, alarms=alarms)
        )
        for issue in issues:
            self._sinks.write_issue(issue)

    def _failed(self, error: Exception) -> None:
        if not self.errors:
            logger.warning(
                "watching controllers failed, and the model goes on without it: %s",
                error,
                exc_info=error,
            )
        self.errors.append(f"{type(error).__name__}: {error}")
