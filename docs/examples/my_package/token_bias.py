"""A controller: a learned bias per head and token on the scores of that token's key."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stabmon.controllers import Controller, Site


class TokenBias(Controller):
    """Add ``W x_j`` to every score of key j, where x_j is the hidden state of its token.

    W starts at 0, where nothing changes.

    Args:
        site: the attention module that it sits in.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.weight = nn.Parameter(torch.zeros(site.heads, site.width))

    def key_bias(self, hidden: Tensor) -> Tensor:
        """Return the bias, ``[B, H, S]``, for hidden states ``[B, S, D]``."""
        return F.linear(hidden, self.weight.to(hidden.dtype)).transpose(1, 2)
