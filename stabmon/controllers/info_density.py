"""A learned number per head and token that draws or sharpens attention."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stabmon.controllers.base import Controller, Site, controller

Form = Literal["key_bias", "query_gain", "both"]
_EPS = 1e-5
"""Term that LayerNorm adds to the variance of the hidden states; torch's default."""


@controller
class InfoDensity(Controller):
    """Learn each token's weight as a key or sharpness as a query.

    With x the hidden states that the attention module is called with, and h = tanh(W LayerNorm(x) +
    b) in (-1, 1):

    - ``key_bias``: the score of query i and key j becomes z_ij + bias_max * h_j;
    - ``query_gain``: it becomes gain_max ** h_i * z_ij;
    - ``both``: gain_max ** h_i * z_ij + bias_max * h'_j, with two h of their own.

    W and b start at 0, where neither form changes anything, and their gradients do not vanish
    there. LayerNorm has no gain and shift of its own: W and b would absorb them. The number of a
    *query* added to its scores would cancel in the softmax.

    Args:
        site: the module to attach to.
        form: ``key_bias``, ``query_gain`` or ``both``.
        bias_max: the largest bias, in nats: positive.
        gain_max: the largest gain; the smallest is its inverse: above 1.

    Raises:
        ValueError: naming the value and the fix.

    Example:
        >>> import torch
        >>> from stabmon.controllers.base import Site
        >>> site = Site("h.0.attn", heads=2, width=8, index=0, count=4)
        >>> InfoDensity(site, form="query_gain").query_gain(torch.ones(1, 3, 8))[0, 0]
        tensor([1., 1., 1.], grad_fn=<SelectBackward0>)
    """

    def __init__(
        self, site: Site, form: Form = "key_bias", bias_max: float = 1.0, gain_max: float = 4.0
    ) -> None:
        super().__init__(site)
        if form not in get_args(Form):
            raise ValueError(f"form {form!r} of info_density: use {', '.join(get_args(Form))}")
        if not bias_max > 0 or not math.isfinite(bias_max):
            raise ValueError(f"bias_max {bias_max!r}: give a positive number of nats, such as 1.0")
        if not gain_max > 1 or not math.isfinite(gain_max):
            raise ValueError(f"gain_max {gain_max!r}: give a number above 1, such as 4.0")
        self.form, self.bias_max, self.gain_max = form, bias_max, gain_max
        self.parts = ("key_bias", "query_gain") if form == "both" else (form,)
        for part in self.parts:
            self.register_parameter(
                f"{part}_weight", nn.Parameter(torch.zeros(site.heads, site.width))
            )
            self.register_parameter(f"{part}_bias", nn.Parameter(torch.zeros(site.heads)))

    def key_bias(self, hidden: Tensor) -> Tensor | None:
        """Return ``bias_max * h``, ``[B, H, S]`` in nats."""
        if "key_bias" not in self.parts:
            return None
        return self.bias_max * self.density("key_bias", hidden)

    def query_gain(self, hidden: Tensor) -> Tensor | None:
        """Return ``gain_max ** h``, ``[B, H, S]`` in (1 / gain_max, gain_max)."""
        if "query_gain" not in self.parts:
            return None
        return torch.exp(math.log(self.gain_max) * self.density("query_gain", hidden))

    def density(self, part: str, hidden: Tensor) -> Tensor:
        """Return h, ``[B, H, S]`` in (-1, 1)."""
        weight, bias = getattr(self, f"{part}_weight"), getattr(self, f"{part}_bias")
        hidden = hidden.to(weight.dtype)
        variance = hidden.var(-1, correction=0, keepdim=True)
        # W (x - mean) = centred x, so that nothing as wide as x is kept
        centred = weight - weight.mean(-1, keepdim=True)
        normed = F.linear(hidden, centred) * torch.rsqrt(variance + _EPS)
        return torch.tanh(normed + bias).transpose(1, 2)
