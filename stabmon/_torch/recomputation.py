"""Forwards that activation checkpoints make again inside backward."""

from __future__ import annotations

import sys
from types import FrameType

import torch
from torch.autograd.function import BackwardCFunction
from torch.utils import checkpoint

# Checked with torch 2.13. An autograd.Function's backward is entered through
# BackwardCFunction.apply: reentrant checkpoints (torch's, DeepSpeed's, Megatron's) recompute there.
# Torch's other checkpoints recompute when a saved tensor is unpacked, in functions of its own file.
# If either is renamed, a recomputed forward is counted as one more micro-batch.
_FUNCTION = BackwardCFunction.apply.__code__
_UNPACK = frozenset({"unpack_hook", "recompute_fn"})


# Reentrant checkpoints run the first forward without gradients in CheckpointFunction.forward.
_CHECKPOINT = checkpoint.CheckpointFunction.forward.__code__


def is_checkpointed() -> bool:
    """Return True inside the first forward of a reentrant activation checkpoint of torch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CHECKPOINT:
            return True
        frame = frame.f_back
    return False


def is_recomputation() -> bool:
    """Return True if a recomputed forward runs now, as in activation checkpoints.

    False for a forward that a hook makes for the first time inside backward (GradCache), and
    outside of backward.
    """
    # the id of the running backward, -1 outside of one; torch's own hooks use it too (checked with
    # torch 2.13). Gone, this raises AttributeError at the first forward
    if torch._C._current_graph_task_id() == -1:
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is _FUNCTION or (
            code.co_name in _UNPACK and code.co_filename == checkpoint.__file__
        ):
            return True
        frame = frame.f_back
    return False
