"""Recover the objective of a backward, as a function of the model's output."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from stabmon._torch.outputs import loss_in
from stabmon._torch.tensors import tensors_in

_VALUES = 1 << 22
"""Largest number of logits kept of one output; of larger ones every k-th row is kept."""
_RESIDUAL = 0.05
"""Share of the gradient's norm that cross-entropy may leave unexplained.

More means that the objective is another one.
"""


class Objective:
    """The objective differentiated through one forward's output, up to a constant.

    Where backward goes through the loss in the output, it is that loss times the gradient that
    arrives at it (a loss scale, a share of an accumulated step). Where the loss is made outside of
    the model it is recovered from the gradient at the logits, if that is the gradient of a
    cross-entropy: :math:`w_i (p_i - e_{y_i})` in each row, which shows the labels and the weights.
    Any other objective is unknown.

    Args:
        output: the forward's output, with its graph.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0]]], requires_grad=True)
        >>> output = logits * 1.0
        >>> objective = Objective(output)
        >>> loss = torch.nn.functional.cross_entropy(output[0], torch.tensor([0]))
        >>> loss.backward()
        >>> before, after = objective.values(torch.tensor([[[0.0, 0.0]]]))
        >>> bool((before - loss).abs() < 1e-6), round(float(after), 3)
        (True, 0.693)
    """

    def __init__(self, output: Any) -> None:
        self._loss = loss_in(output)
        self._factor: Tensor | None = None
        self._rows: slice = slice(None)
        self._logits: Tensor | None = None
        self._gradient: Tensor | None = None
        self._hooks: list[Any] = []
        if self._loss is not None and self._loss.requires_grad:
            self._hooks.append(self._loss.register_hook(self._take_factor))
        logits = _logits_in(output)
        if logits is not None:
            rows = logits.numel() // logits.shape[-1]
            self._rows = slice(0, None, max(1, -(-logits.numel() // _VALUES)))
            self._share = len(range(rows)[self._rows]) / rows
            self._logits = logits.detach().flatten(0, -2)[self._rows].float().clone()
            self._hooks.append(logits.register_hook(self._take_gradient))
        self._loss = None if self._loss is None else self._loss.detach()

    def release(self) -> None:
        """Remove the hooks from the output."""
        while self._hooks:
            self._hooks.pop().remove()

    @torch.no_grad()
    def values(self, output: Any) -> tuple[Tensor, Tensor] | None:
        """Evaluate the objective at its own output and at a later one.

        Args:
            output: the output of the forward made again.

        Returns:
            (before, after), float64 scalars; None where the objective is unknown.
        """
        if self._factor is not None and self._loss is not None:
            loss = loss_in(output)
            return (
                None
                if loss is None
                else (self._loss.double() * self._factor, loss.double() * self._factor)
            )
        logits = _logits_in(output)
        if self._logits is None or self._gradient is None or logits is None:
            return None
        found = _cross_entropy_of(self._logits, self._gradient)
        if found is None:
            return None
        weights, labels = found
        after = logits.detach().flatten(0, -2)[self._rows].float()
        return tuple(
            (_cross_entropy(each, labels) * weights).double().sum() / self._share
            for each in (self._logits, after)
        )  # type: ignore[return-value]

    def _take_factor(self, gradient: Tensor | None) -> None:
        """Keep the gradient of the loss; a hook in backward, which must not raise.

        Compiled code passes None for an output that nothing used.
        """
        if gradient is not None:
            with contextlib.suppress(Exception):
                self._factor = gradient.detach().double().clone()

    def _take_gradient(self, gradient: Tensor | None) -> None:
        """Keep the gradient of the logits; a hook as :meth:`_take_factor`."""
        if gradient is not None:
            with contextlib.suppress(Exception):
                self._gradient = gradient.detach().flatten(0, -2)[self._rows].float().clone()


def _logits_in(output: Any) -> Tensor | None:
    """Return the logits of an output: ``.logits``, else its first float matrix."""
    named = getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named if named.ndim >= 2 else None
    tensor = next(
        (each for each in tensors_in(output) if each.ndim >= 2 and each.is_floating_point()), None
    )
    return tensor if tensor is not None and tensor.shape[-1] > 1 else None


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.logsumexp(-1) - logits.gather(-1, labels[:, None])[:, 0]


def _cross_entropy_of(logits: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return weight and label of each row of a cross-entropy; None for others.

    Args:
        logits: ``[N, C]``, float32.
        gradient: ``[N, C]``, by the logits.
    """
    share, labels = logits.softmax(-1), gradient.argmin(-1)
    at_label = labels[:, None]
    weights = (gradient.gather(-1, at_label) / (share.gather(-1, at_label) - 1))[:, 0]
    # rows that count for nothing, as ignored labels and the last position, have no gradient
    counted = gradient.abs().amax(-1) > 0
    weights = torch.where(counted, weights.nan_to_num(0.0, 0.0, 0.0), 0.0)
    explained = weights[:, None] * (share - torch.nn.functional.one_hot(labels, share.shape[-1]))
    if not bool(counted.any()) or float((gradient - explained).norm()) > _RESIDUAL * float(
        gradient.norm()
    ):
        return None
    return weights, labels
