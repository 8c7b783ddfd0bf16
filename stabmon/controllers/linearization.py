"""Attention that is linear in its scores."""

from __future__ import annotations

from stabmon.controllers.base import Controller, controller


@controller
class Linearization(Controller):
    """Replaces the softmax by p_j = (z_j - min z + 1) / sum over the visible keys; it learns
    nothing itself.

    Hidden keys have exactly no weight and do not count in the minimum, so nothing of the future is
    seen. Differentiable; given the row minimum, the output is a prefix sum: see
    :mod:`stabmon.controllers.linear_attention`. Attention dropout acts on softmax attention alone.
    """

    def linear_share(self) -> float:
        """All of it."""
        return 1.0
