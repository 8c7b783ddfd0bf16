"""Detect recording into a CUDA graph, during which nothing may be read."""

from __future__ import annotations

import torch


def is_capturing() -> bool:
    """Return whether the current CUDA stream is being captured into a graph.

    Work is recorded then and not done: reading a value, or copying one to the host, would end the
    capture with an error. A hook does nothing then. Replays of the graph call no hook at all.

    Example:
        >>> is_capturing()
        False
    """
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
