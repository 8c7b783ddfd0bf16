"""Read facts that the Hugging Face Trainer passes to no callback from frames.

A callback is given neither the other callbacks nor the loss of a micro-batch, nor the checkpoint
that training resumes from, and does not hear of a training that raised. All four are in frames of
``transformers``; each function here says which names it relies on. They were checked with
transformers 5.23. If a name changes, the function returns an empty value: then reporters are not
shared, losses are read from the model's outputs, the state is looked for in the checkpoint of the
present step, or a callback that two trainers share goes over to the second.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from transformers.trainer_callback import CallbackHandler

_FRAMES = 8
"""Frames above a callback in which its handler is looked for; it is one or two above."""


def sibling_callbacks() -> list[Any]:
    """Return the Trainer's callbacks, from the handler that is calling one of them.

    Relies on ``CallbackHandler.call_event`` having the handler as its local ``self``, with the list
    ``callbacks``. The handler is public, and no argument of an event leads to it.

    Returns:
        The callbacks; empty where no handler is found.
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame is None:
            break
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            return list(handler.callbacks)
        frame = frame.f_back
    return []


def trainer_local(name: str) -> Any:
    """Return a local variable of the Trainer's function that is calling a callback.

    Relies on functions of the module ``transformers.trainer`` and on names of their locals:

    - ``tr_loss_step``, in the training loop: the micro-batch's loss as it was differentiated, with
      the division by accumulated batches or items in it. Events get only the logged mean.
    - ``resume_from_checkpoint``, in ``train`` and the loop: the checkpoint's folder. Events get
      only the step, from which a folder that was renamed or moved cannot be found.

    Args:
        name: the local's name.

    Returns:
        Its value in the nearest such function; None where there is none.
    """
    return next(_locals_named(name, sys._getframe(1)), None)


def is_training(state: Any) -> bool:
    """Return whether the Trainer that has this state is in a function of its own, in any thread.

    Relies on methods of the Trainer, in ``transformers.trainer``, having it as their local
    ``self``, and on its attribute ``state``, which each training sets anew.

    Args:
        state: a ``TrainerState``.
    """
    return any(
        getattr(trainer, "state", None) is state
        for frame in sys._current_frames().values()
        for trainer in _locals_named("self", frame)
    )


def _locals_named(name: str, frame: FrameType | None) -> Iterator[Any]:
    """Yield a local of each function of the Trainer that is running, the nearest first."""
    while frame is not None:
        module = frame.f_globals.get("__name__")
        if module == "transformers.trainer" and name in frame.f_code.co_varnames:
            variables = frame.f_locals
            value = variables.get(name)
            # until Python 3.12 a copy that lives as long as the frame, and would keep a batch
            if isinstance(variables, dict):
                variables.clear()
            yield value
        frame = frame.f_back
