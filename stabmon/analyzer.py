"""Look at the attention of any model, trained or not, outside of training."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import nn

from stabmon.capture import AttentionCapture
from stabmon.config import load_config
from stabmon.records import AttentionCall, Diagnosis, LayerInfo, Reading
from stabmon.rules.history import History
from stabmon.rules.tracker import IssueTracker
from stabmon.signals.measure import HeadSums, measure, operator_of


class AttentionAnalyzer:
    """Gathers the statistics of every forward of a model from its making, or from entering it, until :meth:`diagnose` or :meth:`close`.

    Also a context manager. Forwards in evaluation mode and without gradients count like any other.

    Args:
        model: the model to look at.
        signals: names of signals; None for those that training is watched with.
        engine: see :func:`stabmon.operator.attention_operator`.
        attention_modules: patterns of module names whose hand-written softmax is attention, where it is not found by itself.

    Raises:
        TypeError: if ``model`` is no ``nn.Module``.
        ValueError: for an unknown signal or engine.
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
        self._capture = AttentionCapture(model, self._on_call, modules=attention_modules, thorough=True, on_error=self._note)
        self._sums: dict[str, dict[str, HeadSums]] = {}
        self._info: dict[str, LayerInfo] = {}
        self._error: Exception | None = None
        self._open = True
        self._capture.__enter__()

    def diagnose(self) -> Diagnosis:
        """The statistics so far, reduced over all forwards, and the issues that a single reading can show.

        Raises:
            RuntimeError: if no attention call was seen, saying what was looked for; or if measuring one failed.
        """
        if self._error is not None:
            raise RuntimeError(f"measuring attention failed: {self._error}") from self._error
        if not self._sums:
            raise RuntimeError(f"no attention was found; run the model first. Looked for {self._capture.looked_for()}")
        layers = {
            layer: {name: each.value.double().cpu().numpy() for name, each in signals.items()}
            for layer, signals in self._sums.items()
        }
        reading = Reading(step=0, loss=None, layers=layers, info=dict(self._info))
        tracker = IssueTracker(self._config.make_rules(), history=History(2), cooldown_steps=0)
        issues = tracker.update(reading)
        return Diagnosis(0, tuple(issues), layers, (reading,), tracker.open_issues)

    def close(self) -> None:
        """Leave the model as it was found; may be called twice."""
        if self._open:
            self._open = False
            self._capture.__exit__()

    def __enter__(self) -> AttentionAnalyzer:
        if not self._open:
            self._open = True
            self._capture.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _note(self, error: Exception) -> None:
        self._error = self._error or error

    def _on_call(self, call: AttentionCall) -> None:
        with torch.no_grad():
            operator = operator_of(call, self._config.engine)
            found = measure(operator, self._config.signals)
        known = self._sums.get(call.layer)
        self._sums[call.layer] = {name: known[name].merge(each) for name, each in found.items()} if known else found
        self._info[call.layer] = LayerInfo(
            operator.heads, operator.head_dim, call.scale, str(call.dtype).removeprefix("torch."), call.fused, call.softcap
        )
