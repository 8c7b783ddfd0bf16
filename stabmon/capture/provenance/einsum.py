"""Einsums, read as products of batched rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from torch import Tensor

from stabmon.capture.provenance.axes import Axes


@dataclass(frozen=True)
class Einsum:
    """An einsum, a letter for each dimension."""

    letters: tuple[str, ...]
    output: str
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Factors:
    """The two factors of a product, and their places in the result."""

    left: Tensor
    """``[*batch, rows, D]``."""
    right: Tensor
    """``[*batch, columns, D]``."""
    axes: Axes
    """Dimensions of the result that rows and columns lie along."""


def read_einsum(args: tuple[Any, ...]) -> Einsum | None:
    """Return the letters and operands of an einsum, given in any format.

    None where a letter comes twice in an operand.

    >>> import torch
    >>> q = torch.ones(2, 5, 3, 4)
    >>> read_einsum((q, [0, 1, 2, 3], q, [0, 4, 2, 3], [0, 2, 1, 4])).output
    'acbe'
    >>> read_einsum(("...qHd, ...kHd -> ...Hqk", q, q)).letters
    ('ZqHd', 'ZkHd')
    >>> read_einsum(("ab,cb", q[0, 0], q[0, 0])).output
    'ac'
    """
    if args and isinstance(args[0], Tensor):
        count = len(args) // 2
        inputs = ",".join(spelled(part) for part in args[1 : 2 * count : 2])
        args = (
            inputs + (f"->{spelled(args[-1])}" if len(args) % 2 else ""),
            *args[: 2 * count : 2],
        )
    if len(args) == 2 and isinstance(args[1], list | tuple):
        args = (args[0], *args[1])
    if (
        not args
        or not isinstance(args[0], str)
        or not all(isinstance(each, Tensor) for each in args[1:])
    ):
        return None
    letters, output = spelled_out(args[0], args[1:])
    if any(len(set(each)) < len(each) for each in letters):
        return None
    return Einsum(tuple(letters), output, args[1:])


def spelled(numbers: Sequence[Any]) -> str:
    """Return the letters of a list of numbers."""
    return "".join(
        "..." if number is Ellipsis else (ascii_lowercase + ascii_uppercase)[number]
        for number in numbers
    )


def spelled_out(equation: str, tensors: tuple[Tensor, ...]) -> tuple[list[str], str]:
    """Return the letters of each operand and of the result.

    Unused capital letters stand for an ellipsis.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow:
        once = sorted(letter for letter in set(inputs) - {",", "."} if inputs.count(letter) == 1)
        output = ("..." if "..." in inputs else "") + "".join(once)
    free = [letter for letter in reversed(ascii_uppercase) if letter not in equation]
    letters, longest = [], ""
    for part, tensor in zip(inputs.split(","), tensors, strict=True):
        count = tensor.ndim - len(part.replace("...", "")) if "..." in part else 0
        filled = "".join(reversed(free[:count]))
        letters.append(part.replace("...", filled))
        longest = max(longest, filled, key=len)
    return letters, output.replace("...", longest)


def factors_of(einsum: Einsum) -> Factors | None:
    """Return the factors of an einsum that is a product of batched rows and columns.

    The operands share a batch letter and one more, which is summed over; their dimensions stand in
    any order. A batch letter that one of them lacks (grouped heads) has size 1 there. None for
    every other einsum.

    >>> import torch
    >>> q, k = torch.ones(2, 5, 3, 4), torch.ones(2, 7, 3, 4)
    >>> def shapes(equation, q, k):
    ...     found = factors_of(read_einsum((equation, q, k)))
    ...     if found is not None:
    ...         rows, columns = map(sorted, (found.axes.rows, found.axes.columns))
    ...         return tuple(found.left.shape), tuple(found.right.shape), rows, columns
    >>> shapes("b q h d, b k h d -> b h q k", q, k)
    ((2, 3, 5, 4), (2, 3, 7, 4), [2], [3])
    >>> shapes("...qhd,...khd->...qhk", q, k)
    ((2, 3, 5, 4), (2, 3, 7, 4), [1], [3])
    >>> shapes("bghid,bgjd->bghij", torch.ones(2, 3, 6, 5, 4), torch.ones(2, 3, 7, 4))
    ((2, 3, 6, 5, 4), (2, 3, 1, 7, 4), [3], [4])
    >>> shapes("bsd,vd->bsv", torch.ones(2, 5, 4), torch.ones(9, 4)) is None
    True
    """
    if len(einsum.tensors) != 2:
        return None
    (left, right), output, (query, key) = einsum.letters, einsum.output, einsum.tensors
    own = [letter for letter in output if letter in left and letter not in right]
    other = [letter for letter in output if letter in right and letter not in left]
    shared = [letter for letter in output if letter in left and letter in right]
    summed = (set(left) | set(right)) - set(output)
    if (
        len(summed) != 1
        or not summed <= set(left) & set(right)
        or not own
        or not other
        or not shared
    ):
        return None
    row, column = own[-1], other[-1]
    # the operand named second comes first in the result
    if column != output[-1] and row == output[-1]:
        left, right, query, key, row, column = right, left, key, query, column, row
    batch, inner = "".join(letter for letter in output if letter not in row + column), summed.pop()
    axes = Axes(frozenset({output.index(row)}), frozenset({output.index(column)}))
    return Factors(
        arranged(query, left, batch + row + inner),
        arranged(key, right, batch + column + inner),
        axes,
    )


def arranged(tensor: Tensor, letters: str, wanted: str) -> Tensor:
    """Return ``tensor`` with the dimensions ``wanted``, of size 1 where it has none."""
    present = [letter for letter in wanted if letter in letters]
    tensor = tensor.permute([letters.index(letter) for letter in present])
    for place, letter in enumerate(wanted):
        if letter not in letters:
            tensor = tensor.unsqueeze(place)
    return tensor
