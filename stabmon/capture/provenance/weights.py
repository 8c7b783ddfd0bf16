"""Weights: results of a softmax, followed until something is summed with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.capture.provenance.axes import Axes, Carried
from stabmon.capture.provenance.multiply import PRODUCTS, sums
from stabmon.capture.provenance.products import ScoreProvenance

SUMS = ("sum", "nansum", "mean")
READS = {
    *("sum", "nansum", "mean", "std", "var", "std_mean", "var_mean", "max", "min", "amax", "amin"),
    *("aminmax", "argmax", "argmin", "norm", "vector_norm", "median", "quantile", "kthvalue"),
    *("mode", "prod", "logsumexp", "topk", "sort", "getitem", "select", "masked_select"),
    *("multinomial", "histc", "trace", "kl_div", "cross_entropy", "nll_loss", "mse_loss"),
    *("l1_loss", "cdist", "smooth_l1_loss", "binary_cross_entropy", "cosine_similarity", "item"),
    *("data", "grad", "setitem", "det", "diff", "cov", "new_zeros", "new_ones", "new_full"),
    *("new_empty", "new_tensor", "full_like", "zeros_like", "ones_like", "empty_like", "rand_like"),
    *("randn_like", "randint_like", "cumsum", "nuclear_norm", "matrix_norm", "svdvals"),
    *("diagonal", "diag"),
}
"""Operations that read weights, and sum nothing with them."""


class Softmax:
    """Scores of a softmax until its weights are used.

    Args:
        logits: the scores, as they went into it.
        product: what is known of how they came about.
        axis: the dimension along which it runs.
        module: the module that took it.
    """

    def __init__(
        self, logits: Tensor, product: ScoreProvenance, axis: int, module: nn.Module
    ) -> None:
        self.logits: Tensor | None = logits
        self.product: ScoreProvenance | None = product
        self.axis = axis
        self.module = module

    def take(self) -> tuple[Tensor, ScoreProvenance] | None:
        """Return the scores and what is known of them once, then None; they are let go."""
        logits, product = self.logits, self.product
        self.logits = self.product = None
        return None if logits is None or product is None else (logits, product)

    def keep_from(self, changed: Tensor) -> None:
        """Copy the scores if they share memory with a tensor about to change."""
        if self.logits is not None and shares_memory(self.logits, changed):
            self.logits = self.logits.detach().clone()


@dataclass(frozen=True, eq=False)
class Weights:
    """Probabilities, or a tensor computed from them."""

    softmaxes: tuple[Softmax, ...]
    """Softmaxes they came of; several where weights were joined or subtracted."""
    axes: Axes
    grown: bool = False
    """Whether they have been multiplied with a tensor of more elements."""
    kept: tuple[int, int] | None = None
    """Keys that are still there, from the first up to and without the last."""
    strict: bool = False
    """Whether only a sum over the keys is a use."""


def united(records: Iterable[Any], axes: Axes) -> Weights:
    """Return the weights of several tensors as one record."""
    several = [record for record in records if isinstance(record, Weights)]
    softmaxes = tuple(
        {id(softmax): softmax for record in several for softmax in record.softmaxes}.values()
    )
    strict = any(record.strict for record in several)
    return Weights(softmaxes, axes, strict=strict, grown=any(record.grown for record in several))


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors lie in the same storage."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def is_use(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensor: Tensor, weights: Weights
) -> bool:
    """Return whether an operation sums something with these weights."""
    wanted = weights.axes.columns if weights.strict else weights.axes.all
    if name in PRODUCTS:
        return any(each.over & wanted for each in sums(name, args, kwargs, tensor))
    return (
        name in SUMS
        and weights.grown
        and bool(dimensions(args, kwargs, tensor) & weights.axes.columns)
    )


def dimensions(args: tuple[Any, ...], kwargs: Mapping[str, Any], tensor: Tensor) -> frozenset[int]:
    """Return the dimensions that a reduction runs over."""
    given = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
    if given is None or isinstance(given, torch.dtype):
        return frozenset(range(tensor.ndim))
    return frozenset(d % tensor.ndim for d in ([given] if isinstance(given, int) else given))


def next_weights(weights: Weights, carried: Carried, tensor: Tensor, result: Tensor) -> Weights:
    """Follow weights through a view or arithmetic."""
    kept = None
    before, after = weights.axes.columns, carried.axes.columns
    if len(before) == len(after) == 1:
        (old,), (new,) = before, after
        start, stop = weights.kept or (0, tensor.shape[old])
        if result.shape[new] <= stop - start:
            kept = (start + carried.start, start + carried.start + result.shape[new])
    grown = weights.grown or result.numel() > tensor.numel()
    return replace(weights, axes=carried.axes, grown=grown, kept=kept)


Attend = Callable[[Softmax, Weights], None]
"""Receives a softmax when its weights are used."""
