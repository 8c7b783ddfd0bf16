"""Attention that is linear in its scores."""

from __future__ import annotations

from stabmon.controllers.base import Controller, controller


@controller
class Linearization(Controller):
    """Replace the softmax by weights linear in the scores.

    ``p_j = (z_j - min z + 1) / sum`` over the visible keys.

    It has no parameters. Hidden keys have exactly no weight and do not count in the minimum, so
    nothing of the future is seen. Differentiable; given the row minimum, the output is a prefix
    sum: see :mod:`stabmon.controllers.linear_attention`. Attention dropout applies to softmax
    attention alone.

    Example:
        >>> from stabmon.controllers.base import Site
        >>> Linearization(Site("h.0.attn", 2, 8, 0, 1)).linear_share()
        1.0
    """

    def linear_share(self) -> float:
        """Return 1: all attention is linear."""
        return 1.0
