"""Measure the relative change of each parameter group in a sampled step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stabmon._torch.optimizer_adapter import ParameterGroup
from stabmon._torch.tensors import local

MOST_VALUES = 1 << 20
"""Values of a group that are copied."""
MOST_OF_ALL = 1 << 23
"""Values of all groups together that are copied."""
MOST_TENSORS = 32
"""Tensors of a group that are copied from."""


@dataclass(frozen=True, eq=False)
class _Sample:
    """Every ``stride``-th value of a tensor."""

    tensor: Tensor
    stride: int

    def values(self) -> Tensor:
        """Return a float32 copy of the values as they are now."""
        return local(self.tensor.detach()).reshape(-1)[:: self.stride].to(torch.float32, copy=True)


class GroupUpdates:
    r"""Relative change of each parameter group, by a sample of its values.

    The share is :math:`\|\Delta p\| / \|p\|` of up to 32 of the group's tensors, those with two and
    more dimensions if there are any, each by evenly strided values that count for those between
    them. Of sharded parameters the part on this rank is taken. Costs a copy of at most 4 MB a group
    and 32 MB in all from before the step to after it, and one transfer to the host, at sampled
    steps only.
    """

    def __init__(self) -> None:
        self._before: dict[str, list[tuple[_Sample, Tensor]]] = {}
        self.parts: dict[str, float] = {}
        """Relative change of each part by its name, of the newest step compared."""

    @torch.no_grad()
    def before(
        self,
        groups: Sequence[ParameterGroup],
        part_of: Callable[[Tensor], str] = lambda parameter: "",
    ) -> None:
        """Copy the samples, before any optimizer steps.

        Args:
            groups: the groups.
            part_of: returns the name of the part that a parameter is in.
        """
        self._part_of = part_of
        most = min(MOST_VALUES, MOST_OF_ALL // max(1, len(groups)))
        self._before = {
            group.key: [(each, each.values()) for each in _samples(group, most)] for group in groups
        }

    @torch.no_grad()
    def after(self) -> dict[str, float]:
        """Compare with the copies and drop them.

        Returns:
            The relative change of each group, by key; NaN where it was zero before. Empty where
            :meth:`before` was not called.
        """
        before, self._before = self._before, {}
        self.parts = {}
        pairs = [
            (key, each, was, each.values())
            for key, samples in before.items()
            for each, was in samples
        ]
        pairs = [pair for pair in pairs if pair[2].shape == pair[3].shape]
        if not pairs:
            return {}
        device = pairs[0][2].device
        was, now = [pair[2] for pair in pairs], [pair[3] for pair in pairs]
        # torch._foreach_* are the kernels behind torch.optim's foreach=True: one launch for all
        # tensors (checked with torch 2.13); without them, a loop over the tensors gives the same
        norms = [*torch._foreach_norm(was), *torch._foreach_norm(torch._foreach_sub(now, was))]
        values = torch.stack([norm.to(device) for norm in norms]).tolist()
        squares = [
            (each.stride * weight * weight, each.stride * update * update)
            for (_, each, _, _), weight, update in zip(
                pairs, values[: len(pairs)], values[len(pairs) :], strict=True
            )
        ]
        self.parts = _relative([self._part_of(each.tensor) for _, each, _, _ in pairs], squares)
        return _relative([key for key, *_ in pairs], squares)


def _relative(names: Sequence[str], squares: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return the root of summed squares of updates over those of weights, by name."""
    sums: dict[str, tuple[float, float]] = {}
    for name, (weight, update) in zip(names, squares, strict=True):
        old = sums.get(name, (0.0, 0.0))
        sums[name] = old[0] + weight, old[1] + update
    return {
        name: math.sqrt(update / weight) if weight > 0 else math.nan
        for name, (weight, update) in sums.items()
    }


def _samples(group: ParameterGroup, most: int) -> list[_Sample]:
    """Return the sample of a group, the same at every step for the same parameters."""
    tensors = [
        each
        for each in group.parameters
        if each.requires_grad and each.is_floating_point() and local(each).numel()
    ]
    tensors = [each for each in tensors if each.ndim > 1] or tensors
    if len(tensors) > MOST_TENSORS:
        tensors = [tensors[at * len(tensors) // MOST_TENSORS] for at in range(MOST_TENSORS)]
    share = max(1, most // max(1, len(tensors)))
    return [_Sample(each, _stride(local(each).numel(), share)) for each in tensors]


def _stride(values: int, most: int) -> int:
    """Return the smallest odd stride that takes at most ``most`` values.

    An odd one has no factor in common with most widths, and so takes every column in turn.
    """
    stride = -(-values // most)
    return stride if stride == 1 else stride | 1
