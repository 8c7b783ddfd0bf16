"""Scores expected from the weights alone, per head.

H query heads, D head dimension, M width of the input. For inputs of unit mean square without
correlations, ``q = W_q x`` and ``k = W_k y`` give scores of standard deviation ``scale |W_q^T
W_k|_F``, which is ``M s^2`` for random weights of standard deviation s and a scale of ``1 /
sqrt(D)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from stabmon.model_names import KEY_NORMS
from stabmon.projections.head_rows import QueryKey, Rows
from stabmon.projections.locate import find_query_key
from stabmon.projections.norm_gains import gain_and_bias
from stabmon.projections.not_applicable import NotApplicable
from stabmon.records import LayerInfo

RANDOM = 1.1
"""Largest ``randomness`` of an untrained matrix.

Independent entries stay within 1 and a few hundredths, and training grows single directions first.
"""
_ITERATIONS = 24


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """Sizes of one layer's weights; arrays are float64 ``[H]``, per query head."""

    product: np.ndarray
    """``|W_q^T W_k|_F`` (behind norms: of their gains).

    Times the model's ``scale`` it is the standard deviation of scores.
    """
    query: np.ndarray
    """Spectral norm of W_q; behind a norm, the root mean square of its gain."""
    key: np.ndarray
    """Spectral norm of the query head's W_k; behind a norm, as above."""
    query_size: np.ndarray
    """Root mean square of q for inputs of unit mean square: ``|W_q|_F / sqrt(D)``."""
    key_size: np.ndarray
    randomness: float
    """Largest singular value of W_q or W_k over that of random weights.

    Heads are brought to one size first; 1 if untrained.
    """
    normed: bool
    """True where queries and keys are normalised, and gains bound the scores."""
    places: Mapping[str, Sequence[Sequence[tuple[str, str]]]] = field(default_factory=dict)
    """For ``W_q`` and ``W_k`` each head's parameters below the module, and their entries.

    As Python writes them; a side that heads share is left out.
    """

    @property
    def untrained(self) -> bool:
        """Return whether the layer's weights look random, whatever their size."""
        return self.randomness <= RANDOM


def head_weights(module: nn.Module | None, info: LayerInfo) -> HeadWeights | str:
    """Measure the weights of an attention module per head.

    Args:
        module: the module; None where it is not known.
        info: its heads and head dimension.

    Returns:
        The sizes, or the reason why the weights cannot be assigned to heads.
    """
    if module is None:
        return "the module that attends is not known"
    try:
        found = find_query_key(module, info)[0]
        if found.how.startswith("gain of"):
            return _normed(module, info, found)
        return _plain(module, info, found)
    except NotApplicable as reason:
        return str(reason)


def _plain(module: nn.Module, info: LayerInfo, found: QueryKey) -> HeadWeights | str:
    query = [_matrix(head) for head in found.query]
    if found.key is not None:
        key = [_matrix(head) for head in found.key]
    else:
        shared = [_oriented(rows) for rows in found.others if rows.parameter.ndim == 2]
        if not shared or len(query) % len(shared):
            return "its keys are not made by a projection that is known by its name"
        key = [shared[head * len(shared) // len(query)] for head in range(len(query))]
    if query[0].shape[1] != key[0].shape[1]:
        return f"queries are made of {query[0].shape[1]} features and keys of {key[0].shape[1]}"
    values = []
    for w_q, w_k in zip(query, key, strict=True):
        grams = w_q @ w_q.T, w_k @ w_k.T
        top_q, top_k = (
            math.sqrt(max(0.0, float(torch.linalg.eigvalsh(each)[-1]))) for each in grams
        )
        size_q, size_k = (float(each.norm()) / math.sqrt(len(each)) for each in (w_q, w_k))
        values.append(
            (math.sqrt(max(0.0, float((grams[0] * grams[1]).sum()))), top_q, top_k, size_q, size_k)
        )
    product, top_query, top_key, query_size, key_size = np.array(values).T
    return HeadWeights(
        product,
        top_query,
        top_key,
        query_size,
        key_size,
        max(_randomness(query), _randomness(key)),
        False,
        _places(module, found),
    )


def _places(module: nn.Module, found: QueryKey) -> dict[str, list[list[tuple[str, str]]]]:
    """Return each head's parameters by name, with their rows as an index."""
    names = {id(each): name for name, each in module.named_parameters()}
    sides = {"W_q": found.query, "W_k": found.key or ()}
    return {
        side: [
            [
                (names[id(rows.parameter)], f"{':, ' * rows.dim}{rows.start}:{rows.stop}")
                for rows in head
            ]
            for head in heads
        ]
        for side, heads in sides.items()
        if heads and all(id(rows.parameter) in names for head in heads for rows in head)
    }


def _randomness(heads: Sequence[Tensor]) -> float:
    """Return the randomness of the heads' matrices ``[D, M]``, each taken once.

    0 for weights that are all zero.
    """
    once = {id(head): head / head.square().mean().sqrt() for head in heads if head.any()}
    if not once:
        return 0.0
    whole = torch.cat(list(once.values()))
    return _largest_singular_value(whole) / (math.sqrt(len(whole)) + math.sqrt(whole.shape[1]))


def _largest_singular_value(matrix: Tensor) -> float:
    """Return the largest singular value by power iteration.

    Within a few hundredths below it for random weights, closer where one direction stands out.
    """
    vector = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix)
    for _ in range(_ITERATIONS):
        vector = matrix.T @ (matrix @ vector)
        vector = vector / vector.norm().clamp(min=torch.finfo(vector.dtype).tiny)
    return float((matrix @ vector).norm())


def _normed(module: nn.Module, info: LayerInfo, found: QueryKey) -> HeadWeights | str:
    """Measure queries and keys behind a norm.

    q is then its gain times a vector of D entries of unit mean square.
    """
    norm = next(
        (
            child
            for name in KEY_NORMS
            if isinstance(child := getattr(module, name, None), nn.Module)
        ),
        None,
    )
    key_gain = (
        None
        if norm is None
        else next((rows for rows in gain_and_bias(norm) if rows.parameter.ndim == 1), None)
    )
    values, flat = [], True
    for head in found.query:
        gain = _gain(head[0], info.head_dim)
        offset = head[0].offset
        other = (
            gain
            if key_gain is None
            else _gain(_of_size(key_gain, info.head_dim, offset), info.head_dim)
        )
        sizes = [math.sqrt(float(each.square().mean())) for each in (gain, other)]
        flat = flat and bool((gain == gain[0]).all()) and bool((other == other[0]).all())
        values.append((float((gain * other).norm()), *sizes))
    product, top_query, top_key = np.array(values).T
    return HeadWeights(
        product, top_query, top_key, top_query, top_key, 1.0 if flat else math.inf, True
    )


def _of_size(rows: Rows, width: int, offset: float) -> Rows:
    """Return the first ``width`` entries of a gain, stored as the query's is."""
    return Rows(rows.parameter, 0, 0, min(width, rows.parameter.shape[0]), offset)


def _gain(rows: Rows, width: int) -> Tensor:
    gain = rows.view(rows.parameter.detach()).double().cpu().flatten() + rows.offset
    return gain if len(gain) == width else gain.square().mean().sqrt().expand(width)


def _matrix(head: Sequence[Rows]) -> Tensor:
    return _oriented(next(rows for rows in head if rows.parameter.ndim == 2))


def _oriented(rows: Rows) -> Tensor:
    """Return ``[D, M]`` in float64 on the CPU, where no finite weight overflows."""
    view = rows.view(rows.parameter.detach()).cpu().double()
    return view if rows.dim == 0 else view.T
