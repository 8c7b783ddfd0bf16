"""Measure the attention of any model outside of training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import nn

from stabmon._torch.callbacks.inert_hook import InertHook
from stabmon._torch.callbacks.weak_method import weakly
from stabmon.capture import AttentionCapture
from stabmon.capture.coverage.witness import listed
from stabmon.config import load_config
from stabmon.diagnosis import Diagnosis
from stabmon.records import Reading
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.issue_tracker import IssueTracker
from stabmon.signals.accumulator import Measurements, to_host

logger = logging.getLogger("stabmon")


class AttentionAnalyzer:
    """Statistics of every forward of a model, until :meth:`diagnose` or :meth:`close`.

    As a context manager it measures until the context is left, whatever is diagnosed in between.
    Forwards in evaluation mode and without gradients count like any other.

    Args:
        model: the model to measure.
        signals: names of signals; None for those of the preset ``observe``.
        engine: see :func:`stabmon.operator.attention_operator`.
        attention_modules: patterns of module names whose hand-written softmax is attention, where
            it is not found by itself.

    Raises:
        TypeError: if ``model`` is no ``nn.Module``.
        ValueError: for an unknown signal or engine.

    Example:
        >>> import torch
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
        >>> analyzer = AttentionAnalyzer(layer)
        >>> with torch.no_grad():
        ...     _ = layer(torch.randn(1, 4, 8))
        >>> analyzer.diagnose().stats["self_attn"]["attention_entropy"].shape
        (2,)
    """

    def __init__(
        self,
        model: nn.Module,
        signals: Sequence[str] | None = None,
        engine: str = "auto",
        attention_modules: Sequence[str] = (),
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}: give a torch.nn.Module")
        self._config = load_config("observe", signals=signals, engine=engine)
        self._measurements = Measurements(self._config.signals, engine)
        self._error: Exception | None = None
        self._reported: str | None = None
        self._capture = AttentionCapture(
            model,
            self._measurements.add,
            modules=attention_modules,
            always_watch_functions=True,
            on_error=weakly(self._note),
        )
        self._model, self._in_context = model, False
        self._undo: Callable[[], None] | None = None
        self._start()

    def diagnose(self) -> Diagnosis:
        """Return the statistics of all forwards so far, and their issues.

        Returns:
            A diagnosis of step 0. Where some of the model's attention is not seen, its ``unseen``
            names it, and a warning says so once.

        Raises:
            RuntimeError: if no attention call was seen, or if measuring one failed.
        """
        if not self._in_context:
            self.close()
        if self._error is not None:
            raise RuntimeError(f"measuring attention failed: {self._error}") from self._error
        layers = to_host(self._measurements.sums)
        if not layers:
            unseen = (
                f", and {listed(self._capture.witness.unseen)} is none of these"
                if self._capture.witness.unseen
                else ""
            )
            raise RuntimeError(
                "no attention was found; run the model first. Looked for "
                f"{self._capture.looked_for()}{unseen}"
            )
        coverage = self._capture.witness.describe()
        if coverage is not None and coverage != self._reported:
            self._reported = coverage
            logger.warning("%s", coverage)
        reading = Reading(step=0, loss=None, layers=layers, info=dict(self._measurements.info))
        tracker = IssueTracker(self._config.make_rules(), history=History(2), cooldown_steps=0)
        issues = tracker.update(reading)
        return Diagnosis(
            0,
            tuple(issues),
            layers,
            (reading,),
            tracker.open_issues,
            dict(self._capture.witness.unseen),
        )

    def close(self) -> None:
        """Leave the model as it was found; may be called twice."""
        if self._undo is not None:
            self._undo()
            self._undo = None
            self._capture.__exit__()

    def __enter__(self) -> AttentionAnalyzer:
        self._in_context = True
        if self._undo is None:
            self._start()
        return self

    def __exit__(self, *error: object) -> None:
        self._in_context = False
        self.close()

    def _start(self) -> None:
        witness = self._capture.witness
        note = InertHook(lambda _, __, output: witness.end(output), weakly(self._note))
        self._undo = self._model.register_forward_hook(note).remove
        self._capture.__enter__()

    def _note(self, error: Exception) -> None:
        # without the traceback, whose frames would keep the call's tensors
        self._error = self._error or error.with_traceback(None)
