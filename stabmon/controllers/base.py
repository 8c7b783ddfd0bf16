"""The base of controllers, and their registry.

B batch, H query heads, S tokens, D width of the hidden states.
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
    """The attention module of a model that a controller is attached to.

    Example:
        >>> Site("h.0.attn", heads=2, width=8, index=0, count=12).heads
        2
    """

    name: str
    """Qualified name of the module, without wrapper prefixes."""
    heads: int
    """Query heads."""
    width: int
    """Features of the module's hidden states, D."""
    index: int
    """Place among the model's self-attention modules, counted from 0."""
    count: int
    """Number of the model's self-attention modules."""


class Controller(nn.Module):
    """Change of one attention module's attention, by one or more of three formulas.

    A subclass overrides ``key_bias``, ``query_gain`` or ``linear_share``. The model's own attention
    function still runs, on queries and keys that were changed beforehand: masks, windows, grouped
    heads, dropout, checkpointing, autocast and caches stay what they are. As it stands, a
    controller changes nothing.

    Args:
        site: the module to attach to.

    Example:
        >>> class Doubled(Controller):
        ...     def query_gain(self, hidden):
        ...         return hidden.new_full((len(hidden), self.site.heads, hidden.shape[1]), 2.0)
        >>> Doubled(Site("h.0.attn", 2, 8, 0, 1)).key_bias(Tensor()) is None
        True
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.kind, self.options = "", dict[str, Any]()
        """The registered name and the options that it was attached with."""
        self.handles: list[Any] = []
        """Hooks on the attention module, while this is attached."""
        self.call: Any = None
        """The :class:`~stabmon.controllers.call.ControlledCall` under way, if any."""
        self.listener: Callable[[Controller, AttentionCall, AttentionCall], None] | None = None
        """Called with the original and the modified attention of each call.

        See :class:`~stabmon.controllers.watch.ControllerWatch`.
        """

    def key_bias(self, hidden: Tensor) -> Tensor | None:
        """Return the bias added to every score of a key; None for none.

        Computed once per token and remembered with its key, so that it may depend on that token
        alone.

        Args:
            hidden: ``[B, S, D]`` hidden states of the tokens.

        Returns:
            ``[B, H, S]`` in nats.

        Example:
            >>> class Recent(Controller):
            ...     def key_bias(self, hidden):
            ...         return hidden.norm(dim=-1)[:, None].expand(-1, self.site.heads, -1)
            >>> site = Site("h.0.attn", heads=2, width=8, index=0, count=1)
            >>> Recent(site).key_bias(Tensor(1, 5, 8)).shape
            torch.Size([1, 2, 5])
        """
        return None

    def query_gain(self, hidden: Tensor) -> Tensor | None:
        """Return the factor on every score of a query; None for none.

        Args:
            hidden: ``[B, S, D]`` hidden states of the tokens.

        Returns:
            ``[B, H, S]``, dimensionless.

        Example:
            >>> class Doubled(Controller):
            ...     def query_gain(self, hidden):
            ...         return hidden.new_full((len(hidden), self.site.heads, hidden.shape[1]), 2.0)
            >>> site = Site("h.0.attn", heads=2, width=8, index=0, count=1)
            >>> Doubled(site).query_gain(Tensor(1, 3, 8))[0, 0]
            tensor([2., 2., 2.])
        """
        return None

    def linear_share(self) -> Tensor | float | None:
        """Return the share of linear instead of softmax attention; None for none.

        Returns:
            ``[H]`` or a number, in [0, 1].

        Example:
            >>> class HalfLinear(Controller):
            ...     def linear_share(self):
            ...         return 0.5
            >>> HalfLinear(Site("h.0.attn", heads=2, width=8, index=0, count=1)).linear_share()
            0.5
        """
        return None


CONTROLLERS: Registry[type[Controller]] = Registry("controller", package="stabmon.controllers")
C = TypeVar("C", bound=type[Controller])


def controller(cls: C) -> C:
    """Register a controller under its class name in snake case.

    ``InfoDensity`` is ``info_density``.

    Args:
        cls: a class derived from :class:`Controller`.

    Returns:
        The class itself.

    Raises:
        ValueError: if another controller has that name.

    Example:
        >>> @controller
        ... class InfoDensity(Controller):
        ...     "A second one."
        Traceback (most recent call last):
        ValueError: controller 'info_density' is registered twice, ...
    """
    CONTROLLERS.register(re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower(), cls)
    return cls
