"""What a controller is, and the table of all controllers. B batch, H query heads, S tokens, D width
of the hidden states.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from stabmon.records import AttentionCall
from stabmon.registry import Registry


@dataclass(frozen=True)
class Site:
    """Where a controller sits: one attention module of a model."""

    name: str
    """Qualified name of the module, without what wrappers put in."""
    heads: int
    """Query heads."""
    width: int
    """Features of the hidden states that the module is called with."""
    index: int
    """Which of the model's self-attention modules this is, counted from 0 in the order of the
    model.
    """
    count: int
    """How many there are."""


class Controller(nn.Module):
    """Changes what one attention module attends to; a subclass says how by overriding one or more
    of three formulas.

    The model's own attention function still runs, on queries and keys that were changed beforehand:
    masks, windows, grouped heads, dropout, checkpointing, autocast and caches stay what they are.
    As it stands, a controller changes nothing.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.kind, self.options = "", dict[str, Any]()
        """What it was attached as: its registered name, and its options."""
        self.handles: list[Any] = []
        """Hooks on the attention module, while this is attached."""
        self.call: Any = None
        """What is known of the call that is under way, while one is."""
        self.listener: Callable[[Controller, AttentionCall, AttentionCall], None] | None = None
        """Told of the original and of the modified attention of each call; see
        :class:`~stabmon.controllers.watch.ControllerWatch`.
        """

    def key_bias(self, hidden: Tensor) -> Tensor | None:
        """``[B, H, S]`` what is added to every score of a key, for the tokens ``hidden`` ``[B, S,
        D]``; None for nothing.

        Computed once a token and remembered with its key, so that it may depend on that token
        alone.
        """
        return None

    def query_gain(self, hidden: Tensor) -> Tensor | None:
        """``[B, H, S]`` what every score of a query is multiplied by, for the tokens ``hidden``
        ``[B, S, D]``; None for nothing.
        """
        return None

    def linear_share(self) -> Tensor | float | None:
        """``[H]`` or a number in [0, 1]: how much of the attention is linear instead of softmax;
        None for nothing of it.
        """
        return None


CONTROLLERS: Registry[type[Controller]] = Registry("controller", package="stabmon.controllers")
C = TypeVar("C", bound=type[Controller])


def controller(cls: C) -> C:
    """Register a controller under its class name in snake case: ``InfoDensity`` is
    ``info_density``.
    """
    CONTROLLERS.register(re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower(), cls)
    return cls
