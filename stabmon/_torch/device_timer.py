"""Measure what measurements take on a CUDA device, apart from training's own work in its queue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from stabmon._torch.graph_capture import is_capturing


class DeviceTimer:
    """Seconds of kernels between marks in CUDA streams.

    On a CUDA device work is queued: the clock of the host sees neither the time of a kernel where
    it is called nor, where a result is read, whose kernels it waits for. On a CPU both are no
    matter, and nothing is marked.

    Example:
        >>> timer = DeviceTimer()
        >>> with timer.around(torch.ones(2)):
        ...     total = torch.ones(2).sum()
        >>> timer.is_used, timer.finish()
        (False, 0.0)
    """

    def __init__(self) -> None:
        self._marks: list[tuple[torch.device, torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def is_used(self) -> bool:
        """Return whether anything has been marked since the last :meth:`finish`."""
        return bool(self._marks)

    @contextmanager
    def around(self, tensor: Tensor | None) -> Iterator[None]:
        """Mark the work that is queued inside, on the device of a tensor."""
        if tensor is None or tensor.device.type != "cuda" or is_capturing():
            yield
            return
        with torch.cuda.device(tensor.device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            try:
                yield
            finally:
                end.record()
                self._marks.append((tensor.device, begin, end))

    def finish(self) -> float:
        """Wait for the devices in use, and return the seconds between all marks since the last."""
        marks, self._marks = self._marks, []
        for device in {device for device, *_ in marks}:
            torch.cuda.current_stream(device).synchronize()
        return float(sum(begin.elapsed_time(end) for _, begin, end in marks)) / 1000
