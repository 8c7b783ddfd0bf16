"""Attention of one layer over a whole prompt, the basis of every choice of keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stabmon.analysis.dtypes import compute_dtype
from stabmon.operator import AttentionOperator


@dataclass(frozen=True, eq=False)
class PromptLayer:
    """One layer's attention over a prompt, in float32 and per sample.

    Padding on either side counts nowhere. B batch, H query heads, H_kv key heads, S prompt
    positions, w queries of the window.
    """

    name: str
    """Qualified name of the attending module."""
    operator: AttentionOperator
    """Causal self-attention over the prompt, S queries by S keys."""
    key_heads: int
    """Number of heads in the cache, H_kv.

    Fewer than the kernel's where keys are stored in another form (latent attention).
    """
    window: int
    """Number of each sample's last real queries.

    Their attention judges the other keys, and their own keys are kept.
    """

    @cached_property
    def valid(self) -> Tensor:
        """Return ``[B, S]`` bool: the position holds a token."""
        return self.operator.is_counted.any(dim=1)

    @cached_property
    def lengths(self) -> list[int]:
        """Return the number of tokens of each sample, padding not counted."""
        return [int(n) for n in self.valid.sum(1).tolist()]

    @cached_property
    def in_window(self) -> Tensor:
        """Return ``[B, S]`` bool: one of the last ``window`` tokens of its sample."""
        later = self.valid.flip(1).cumsum(1).flip(1)
        return self.valid & (later <= self.window)

    @cached_property
    def before(self) -> Tensor:
        """Return ``[B, S]`` bool: a token before the window."""
        return self.valid & ~self.in_window

    @cached_property
    def weights(self) -> Tensor:
        """Compute the attention weights of the window's queries, ``[B, H, w, S]``.

        Rows are 0 where a sample is shorter than the window.
        """
        attention = self.operator
        places = torch.arange(1, attention.queries + 1, device=self.valid.device)
        last = [int(n) for n in (self.valid * places).amax(1).tolist()]
        shape = (attention.batch, attention.heads, self.window, attention.keys)
        dtype = compute_dtype(attention.query)
        weights = torch.zeros(shape, dtype=dtype, device=attention.query.device)
        for samples, end in _runs(last):
            rows = slice(max(0, end - shape[2]), end)
            cols, block = attention.probabilities_of(rows, samples)
            weights[samples, :, shape[2] - (rows.stop - rows.start) :, cols] = block.to(dtype)
        short = self.valid.sum(1) < shape[2]
        if bool(short.any()):  # their first rows are padding
            starts = shape[2] - self.valid.sum(1)
            padding = torch.arange(shape[2], device=weights.device) < starts[:, None]
            weights.masked_fill_(padding[:, None, :, None], 0.0)
        return weights

    @cached_property
    def received(self) -> Tensor:
        """Compute the attention mass of each key over all queries, ``[B, H, S]``.

        No S by S map is formed.
        """
        counted = self.operator.is_counted.to(self.weights.dtype)[..., None]
        return self.operator.rmatvec(counted)[..., 0]

    def check(self) -> None:
        """Raise an error for non-causal attention or NaN weights.

        Raises:
            ValueError: naming the layer.
        """
        attention = self.operator
        place = torch.arange(1, attention.queries + 1, device=attention.query.device)
        if attention.queries != attention.keys or bool((attention.n_visible() > place).any()):
            raise ValueError(
                f"{self.name} attends in both directions or to another sequence, as encoders do: "
                "a KV cache exists in causal decoders only, give a decoder"
            )
        if not bool(self.weights.isfinite().all()):
            raise ValueError(
                f"{self.name} has NaN attention weights: keys cannot be ranked by them, repair "
                "the model first"
            )

    @property
    def is_windowed(self) -> bool:
        """Return whether the last query misses tokens, as under a sliding window."""
        seen = self.operator.n_visible().amax((1, 2))
        return bool((seen < self.valid.sum(1)).any())


def _runs(ends: list[int]) -> list[tuple[slice, int]]:
    """Return neighbouring samples with the same value as slices."""
    runs: list[tuple[slice, int]] = []
    for index, end in enumerate(ends):
        if runs and runs[-1][1] == end:
            runs[-1] = (slice(runs[-1][0].start, index + 1), end)
        else:
            runs.append((slice(index, index + 1), end))
    return runs
