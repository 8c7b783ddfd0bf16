"""Positions of tokens in each sample, counted from the end if negative."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Wanted = int | Sequence[int] | Sequence[Sequence[int]] | Tensor
"""One position, several for every sample, or ``[B, n]`` of them."""


class Positions:
    """Positions of tokens, for all samples alike or one by one.

    A position from 0 on counts from the first column of the batch, padding included. A negative one
    counts from the end of the sample's own tokens: -1 is the last token that is not padding, on
    whichever side the padding is.

    Args:
        wanted: see :data:`Wanted`.
        what: their name in errors.
        start: number of the first sample, where a batch is run in parts.

    Raises:
        ValueError: if they are not integers, or there are none.
    """

    def __init__(self, wanted: Wanted, what: str, start: int = 0) -> None:
        self._wanted, self._what, self._start = wanted, what, start
        self.grid = torch.as_tensor(wanted).cpu()
        if (
            self.grid.is_floating_point()
            or self.grid.dtype == torch.bool
            or self.grid.ndim > 2
            or self.grid.numel() == 0
        ):
            raise ValueError(
                f"{what} {wanted!r}: give a position, a list of them, or a list for each sample"
            )
        if self.grid.ndim == 0:
            self.grid = self.grid[None]

    def beginning(self, start: int) -> Positions:
        """Return the positions of the part of the batch from sample ``start`` on."""
        return Positions(self._wanted, self._what, start)

    def check(self, samples: int, *, is_part: bool = False) -> None:
        """Raise an error for positions of another number of samples.

        Args:
            samples: samples in the batch, or in the part of it.
            is_part: True if more may follow.

        Raises:
            ValueError: naming both numbers.
        """
        given = len(self.grid) - self._start
        if self.grid.ndim == 2 and (given < samples or (given > samples and not is_part)):
            raise ValueError(
                f"{self._what}s are given for {len(self.grid)} samples, and the batch has "
                f"{samples + self._start}"
            )

    def of(self, index: int, valid: Tensor) -> Tensor:
        """Return the positions ``[n]`` of one sample.

        Args:
            index: the sample.
            valid: ``[N]`` bool, its tokens that are not padding.

        Raises:
            ValueError: naming the position, if it is out of range or padding.
        """
        sample = index + self._start
        wanted: list[int] = (self.grid if self.grid.ndim == 1 else self.grid[sample]).tolist()
        own = valid.nonzero()[:, 0].tolist()
        found = []
        for position in wanted:
            if position >= len(valid) or position < -len(own):
                raise ValueError(
                    f"{self._what} {position} is out of range: sample {sample} has {len(own)} "
                    f"tokens in {len(valid)} columns"
                )
            place = position if position >= 0 else own[position]
            if place not in own:
                raise ValueError(
                    f"{self._what} {position} of sample {sample} is padding: its tokens are "
                    f"{own[0]} to {own[-1]}"
                )
            found.append(place)
        return torch.tensor(found, device=valid.device)


def first_of(valid: Tensor) -> Tensor:
    """Return the first valid token of each row of ``[..., N]`` bool; else 0."""
    return valid.to(torch.uint8).argmax(-1)
