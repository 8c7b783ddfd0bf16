"""Signals of one step's attention calls, merged over micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from stabmon._torch.number_formats import format_of
from stabmon.operator import AttentionOperator
from stabmon.operator.from_call import operator_of
from stabmon.records import AttentionCall, LayerInfo
from stabmon.signals.base import SIGNALS
from stabmon.signals.reduce import HeadSums, measure

_LONGEST_REST = 64
"""Most samples for which a signal that failed is left out."""
EXP_RANGE = "exp_range"
"""Signal that is measured wherever attention writes its exponentials by hand."""


class Measurements:
    """Signals per head of the calls of a step so far, on their own devices.

    A signal that raises where others do not is reported once, left out of the sample, and tried
    again after 1, 2, 4, 8 … 64 samples without it. One sample in which it works ends that.

    Args:
        signals: names of the signals to measure.
        engine: see :func:`stabmon.operator.attention_operator`.
        sample_rows: see :func:`stabmon.signals.measure`.
        on_error: called with the first error of each failing signal; None to raise it.
    """

    def __init__(
        self,
        signals: Sequence[str],
        engine: str = "auto",
        sample_rows: int | None = None,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        self.sums: dict[str, dict[str, HeadSums]] = {}
        self.info: dict[str, LayerInfo] = {}
        self.modules: dict[str, nn.Module] = {}
        """The module behind each layer's name."""
        self._most_visible: dict[str, Tensor] = {}
        self._all_signals = tuple(signals)
        self._signals = list(signals)
        """The signals of this sample."""
        self._resting: dict[str, _Rest] = {}
        """The signals that have failed, until they work again."""
        self._reported: set[str] = set()
        self._engine = engine
        self._sample_rows = sample_rows
        self._on_error = on_error
        self._generator = torch.Generator()

    def start(self, step: int) -> None:
        """Drop all calls and begin an optimizer step.

        The draw of rows depends on the step alone, so that a resumed run draws the same rows.
        """
        if self.sums and self._resting:
            self._rest_after_sample()
        self.sums, self.info, self.modules = {}, {}, {}
        if self._sample_rows is not None:
            self._generator.manual_seed(step)

    def add(self, call: AttentionCall) -> None:
        """Measure one call, and keep none of its tensors."""
        with torch.no_grad():
            operator = operator_of(call, self._engine)
            found = self._measure(operator)
            if call.exp_range is not None and EXP_RANGE not in found:
                found |= measure(operator, [EXP_RANGE])
        known = self.sums.get(call.layer)
        same = known is not None and all(
            name in known and known[name].total.shape == each.total.shape
            for name, each in found.items()
        )
        self.sums[call.layer] = (
            {name: known[name].merge(each) for name, each in found.items()}
            if known and same
            else found
        )
        self.info[call.layer] = LayerInfo(
            heads=operator.heads,
            head_dim=operator.head_dim,
            scale=call.scale,
            dtype=format_of(call.dtype),
            fused=call.fused,
            softcap=call.softcap,
            exp_dtype=None if call.exp_dtype is None else format_of(call.exp_dtype),
        )
        if call.layer not in self._most_visible:
            counted = operator.n_visible().masked_fill(~operator.is_counted, 0)
            self._most_visible[call.layer] = counted.max()
        if call.module is not None:
            self.modules[call.layer] = call.module

    @property
    def most_visible(self) -> dict[str, int]:
        """Most keys that a row of each layer saw at its first measurement of the run.

        The host waits for a device that still counts them.
        """
        return {layer: int(count) for layer, count in self._most_visible.items()}

    @property
    def least_visible(self) -> dict[str, int]:
        """Visible keys that a row needs to count, by signal, where it needs more than 2."""
        least = {name: SIGNALS[name].least_visible for name in self._all_signals}
        return {name: count for name, count in least.items() if count > 2}

    def _measure(self, operator: AttentionOperator) -> dict[str, HeadSums]:
        try:
            return measure(
                operator, self._signals, sample_rows=self._sample_rows, generator=self._generator
            )
        except Exception:
            if self._on_error is None:
                raise
            failing = self._failing(operator)
            if not failing or len(failing) == len(self._signals):
                raise  # the cause is not a signal
            for name, reason in failing.items():
                self._resting.setdefault(name, _Rest()).fail()
                if name not in self._reported:
                    self._reported.add(name)
                    reason.add_note(
                        f"raised by the signal {name!r}, which is left out for a sample, and then "
                        "tried again at growing intervals"
                    )
                    self._on_error(reason)
            self._signals = [name for name in self._signals if name not in failing]
            return measure(
                operator, self._signals, sample_rows=self._sample_rows, generator=self._generator
            )

    def _rest_after_sample(self) -> None:
        """Choose the signals of the next sample, after one with calls."""
        for name in [name for name, rest in self._resting.items() if rest.ends_well()]:
            del self._resting[name]
        self._signals = [
            name
            for name in self._all_signals
            if name not in self._resting or self._resting[name].is_over
        ]

    def _failing(self, operator: AttentionOperator) -> dict[str, Exception]:
        failing = {}
        for name in self._signals:
            try:
                measure(operator, [name])
            except Exception as error:
                # the frames of a traceback would keep the call's tensors alive
                failing[name] = error.with_traceback(None)
        return failing


class _Rest:
    """Samples for which a signal that failed is left out: 1, 2, 4 … 64.

    >>> rest = _Rest()
    >>> rest.fail(); rest.ends_well(), rest.is_over
    (False, False)
    >>> rest.ends_well(), rest.is_over  # one sample without it
    (False, True)
    >>> rest.ends_well()  # it did not fail in the sample after
    True
    """

    def __init__(self) -> None:
        self._samples = 1
        self._left = 0
        self._has_failed = False

    @property
    def is_over(self) -> bool:
        """The signal is tried in the next sample."""
        return self._left == 0

    def fail(self) -> None:
        """Note that it failed in this sample."""
        self._has_failed = True

    def ends_well(self) -> bool:
        """Note the end of a sample; return whether the signal was tried and worked."""
        if self._has_failed:
            self._has_failed, self._left = False, self._samples
            self._samples = min(2 * self._samples, _LONGEST_REST)
            return False
        if self._left == 0:
            return True
        self._left -= 1
        return False


def to_host(sums: Mapping[str, Mapping[str, HeadSums]]) -> dict[str, dict[str, np.ndarray]]:
    """Return ``[layer][signal]`` as float64 ``[H]`` on the host, in one transfer."""
    entries = [
        (layer, name, each) for layer, signals in sums.items() for name, each in signals.items()
    ]
    if not entries:
        return {}
    device = entries[0][2].total.device
    totals = torch.cat([each.total.to(device) for *_, each in entries]).double()
    counts = torch.cat([each.count.to(device) for *_, each in entries]).double()
    total, count = torch.stack([totals, counts]).cpu().numpy()
    is_max = np.repeat(
        [each.signal.reduction == "max" for *_, each in entries],
        [each.total.numel() for *_, each in entries],
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        flat = np.where(is_max, np.where(count > 0, total, np.nan), total / count)
    layers: dict[str, dict[str, np.ndarray]] = {}
    at = 0
    for layer, name, each in entries:
        heads = each.total.numel()
        layers.setdefault(layer, {})[name] = flat[at : at + heads].copy()
        at += heads
    return layers
