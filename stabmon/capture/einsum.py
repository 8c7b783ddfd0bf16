"""Which einsum is a product of queries and keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def einsum_operands(args: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
    """Query ``[*batch, Q, D]`` and key ``[*batch, K, D]`` of an einsum that gives ``[*batch, Q, K]``.

    Any letters in any order will do (``bhid,bhjd->bhij``, ``bqhd,bkhd->bhqk``), as long as both operands have the batch
    letters and share one more, which is summed over. None for every other einsum.

    >>> import torch
    >>> q, k = torch.ones(2, 5, 3, 4), torch.ones(2, 7, 3, 4)
    >>> [tuple(x.shape) for x in einsum_operands(("b q h d, b k h d -> b h q k", q, k))]
    [(2, 3, 5, 4), (2, 3, 7, 4)]
    >>> einsum_operands(("bsd,vd->bsv", torch.ones(2, 5, 4), torch.ones(9, 4))) is None
    True
    """
    if len(args) == 2 and isinstance(args[1], list | tuple):
        args = (args[0], *args[1])
    if len(args) != 3 or not isinstance(args[0], str) or "->" not in args[0] or "." in args[0]:
        return None
    inputs, output = args[0].replace(" ", "").split("->")
    if inputs.count(",") != 1 or len(output) < 3:
        return None
    left, right = inputs.split(",")
    batch, row, column = output[:-2], output[-2], output[-1]
    tensors = {left: args[1], right: args[2]}
    if row in right and row not in left:
        left, right = right, left
    summed = (set(left) & set(right)) - set(output)
    wanted = set(batch) | summed
    if left == right or len(summed) != 1 or set(left) != wanted | {row} or set(right) != wanted | {column}:
        return None
    inner = summed.pop()
    query = tensors[left].permute([left.index(letter) for letter in batch + row + inner])
    key = tensors[right].permute([right.index(letter) for letter in batch + column + inner])
    return query, key
