"""Linear attention in the first layers, softmax in the last."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stabmon.controllers.base import Controller, Site, controller

_EDGE = 0.01
"""Least distance of an initial share from 0 and 1, where its gradient vanishes."""


@controller
class LinearRamp(Controller):
    """Mix linear and softmax attention by a share for each layer.

    The output is ``alpha * linear + (1 - alpha) * softmax``.

    alpha = (L - l) / L in layer l = 0 ... L - 1.

    Args:
        site: the module to attach to; l and L are its place among the model's self-attention
            modules.
        learned: learn alpha, one per head, as the sigmoid of a parameter.
        start: initial value of a learned alpha in every layer; None for the ramp.

    Raises:
        ValueError: naming the value and the fix.

    Example:
        >>> LinearRamp(Site("h.1.attn", heads=2, width=8, index=1, count=4)).linear_share()
        0.75
    """

    def __init__(self, site: Site, learned: bool = False, start: float | None = None) -> None:
        super().__init__(site)
        if start is not None and (not learned or not 0 < start < 1):
            raise ValueError(
                f"start {start!r} of linear_ramp: give a number between 0 and 1, with learned=True"
            )
        self.alpha = (site.count - site.index) / site.count if start is None else start
        self.share = None
        if learned:
            bounded = torch.full((site.heads,), self.alpha).clamp(_EDGE, 1 - _EDGE)
            self.share = nn.Parameter(torch.logit(bounded))

    def linear_share(self) -> Tensor | float:
        """Return alpha, ``[H]`` where it is learned."""
        return self.alpha if self.share is None else torch.sigmoid(self.share)
