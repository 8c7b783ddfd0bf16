"""Which einsum is a product of queries and keys."""

from __future__ import annotations

from string import ascii_uppercase
from typing import Any

from torch import Tensor


def einsum_operands(args: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
    """Query ``[*batch, Q, D]`` and key ``[*batch, K, D]`` of an einsum that gives ``[*batch, Q, K]``.

    Any letters in any order will do (``bhid,bhjd->bhij``, ``...qhd,...khd->...hqk``), as long as the operands share a batch
    letter and one more, which is summed over. A batch letter that one of them lacks (grouped heads) has size 1 there. None for
    every other einsum.

    >>> import torch
    >>> q, k = torch.ones(2, 5, 3, 4), torch.ones(2, 7, 3, 4)
    >>> [tuple(x.shape) for x in einsum_operands(("b q h d, b k h d -> b h q k", q, k))]
    [(2, 3, 5, 4), (2, 3, 7, 4)]
    >>> [tuple(x.shape) for x in einsum_operands(("...qhd,...khd->...hqk", q, k))]
    [(2, 3, 5, 4), (2, 3, 7, 4)]
    >>> [tuple(x.shape) for x in einsum_operands(("bghid,bgjd->bghij", torch.ones(2, 3, 6, 5, 4), torch.ones(2, 3, 7, 4)))]
    [(2, 3, 6, 5, 4), (2, 3, 1, 7, 4)]
    >>> einsum_operands(("bsd,vd->bsv", torch.ones(2, 5, 4), torch.ones(9, 4))) is None
    True
    """
    if len(args) == 2 and isinstance(args[1], list | tuple):
        args = (args[0], *args[1])
    if len(args) != 3 or not isinstance(args[0], str) or args[0].count("->") != 1 or args[0].count(",") != 1:
        return None
    (left, right), output = spelled_out(args[0], args[1:])
    if len(output) < 3:
        return None
    batch, row, column = output[:-2], output[-2], output[-1]
    query, key = args[1], args[2]
    if row in right and row not in left:
        left, right, query, key = right, left, key, query
    summed = (set(left) & set(right)) - set(output)
    own, other = set(left) - summed - {row}, set(right) - summed - {column}
    if len(summed) != 1 or row in right or column in left or own | other != set(batch) or not own & other:
        return None
    inner = summed.pop()
    return arranged(query, left, batch + row + inner), arranged(key, right, batch + column + inner)


def spelled_out(equation: str, tensors: tuple[Tensor, ...]) -> tuple[list[str], str]:
    """The letters of each operand and of the result, with unused capital letters for an ellipsis."""
    inputs, output = equation.replace(" ", "").split("->")
    free = [letter for letter in reversed(ascii_uppercase) if letter not in equation]
    letters, longest = [], ""
    for part, tensor in zip(inputs.split(","), tensors, strict=True):
        hidden = "".join(reversed(free[: tensor.ndim - len(part.replace("...", ""))])) if "..." in part else ""
        letters.append(part.replace("...", hidden))
        longest = max(longest, hidden, key=len)
    return letters, output.replace("...", longest)


def arranged(tensor: Tensor, letters: str, wanted: str) -> Tensor:
    """``tensor`` with its dimensions in the order of ``wanted``, of size 1 where it has none."""
    present = [letter for letter in wanted if letter in letters]
    tensor = tensor.permute([letters.index(letter) for letter in present])
    for place, letter in enumerate(wanted):
        if letter not in letters:
            tensor = tensor.unsqueeze(place)
    return tensor
