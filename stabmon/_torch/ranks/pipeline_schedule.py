"""Read what a pipeline of ``torch.distributed.pipelining`` does with a forward that is running."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

_PACKAGE = "torch.distributed.pipelining"
_SCHEDULES = f"{_PACKAGE}.schedules"
_STAGE = f"{_PACKAGE}.stage"


def divisor_of_gradients() -> float:
    """Return the number by which the schedule that runs a forward will divide its gradients.

    To be called inside that forward, in its thread. A schedule of ``torch.distributed.pipelining``
    divides by its number of micro-batches once all backwards are over, unless it was made with
    ``scale_grads=False``. 1 where no schedule runs the forward.

    Example:
        >>> divisor_of_gradients()
        1.0
    """
    for frame in _frames_of(_SCHEDULES):
        running = frame.f_locals.get("self")
        # scale_grads and _n_microbatches of _PipelineSchedule (checked with torch 2.13); without
        # them norms are as many times too large as there are micro-batches
        count = getattr(running, "_n_microbatches", None)
        if isinstance(count, int):
            return float(count) if getattr(running, "scale_grads", False) else 1.0
    return 1.0


def runs_on_no_batch() -> bool:
    """Return whether a forward only finds the shapes that pipeline stages send each other.

    To be called inside that forward, in its thread. Before its first micro-batch, a stage runs once
    on uninitialised tensors, whose attention says nothing about training.

    Example:
        >>> runs_on_no_batch()
        False
    """
    # _forward_metadata_inference of _PipelineStageBase (torch 2.13), _shape_inference before;
    # under another name the first reading holds a micro-batch that is none
    return any("inference" in frame.f_code.co_name for frame in _frames_of(_STAGE))


def _frames_of(module: str) -> Iterator[FrameType]:
    """Yield the frames of a module's functions, from the caller outward."""
    frame = None if module not in sys.modules else sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__") == module:
            yield frame
        frame = frame.f_back
