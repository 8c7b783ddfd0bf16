"""Batches of bytes."""

from __future__ import annotations

import glob
import os
import sysconfig
from functools import cache

import torch
from torch import Tensor

from tests.bench.byte_gpt.recipe import Recipe

CODE_BYTES = 700_000
"""Characters of Python modules after which no further module is read."""


class Batches:
    """Batches of a recipe's text, the same for all variants of it."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self.recipe = recipe
        self.generator = torch.Generator().manual_seed(1000 + seed)

    def next(self) -> tuple[Tensor, Tensor]:
        """Return tokens and targets ``[B, S]`` to learn from."""
        return self._draw(self.generator, kept_back=False)

    def kept_back(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return tokens and targets never learned from."""
        return self._draw(generator, kept_back=True)

    def _draw(self, generator: torch.Generator, kept_back: bool) -> tuple[Tensor, Tensor]:
        size, length, text = self.recipe.batch, self.recipe.length, self.recipe.text
        if text == "copy":
            half = torch.randint(0, 64, (size, (length + 1) // 2 + 1), generator=generator)
            rows = torch.cat([half, half], 1)[:, : length + 1]
        elif text == "sum":
            rows = _sums(size, length + 1, generator)
        else:
            source = _parts(text)[kept_back]
            starts = torch.randint(0, len(source) - length - 1, (size,), generator=generator)
            rows = torch.stack([source[at : at + length + 1] for at in starts.tolist()])
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _sums(size: int, length: int, generator: torch.Generator) -> Tensor:
    """Return rows in which four of five numbers are the sum of the two before, modulo 32."""
    rows = torch.randint(0, 32, (size, length), generator=generator)
    random = torch.rand(size, length, generator=generator) < 0.2
    for at in range(2, length):
        rows[:, at] = torch.where(
            random[:, at], rows[:, at], (rows[:, at - 1] + rows[:, at - 2]) % 32
        )
    return rows


@cache
def _parts(text: str) -> tuple[Tensor, Tensor]:
    """Return the bytes to learn from, and every sixteenth of 64 parts, which is kept back."""
    if text == "text":
        import pydoc_data.topics

        raw = "".join(pydoc_data.topics.topics.values())
    else:
        raw = ""
        for path in sorted(glob.glob(os.path.join(sysconfig.get_paths()["stdlib"], "*.py"))):
            with open(path, errors="ignore") as file:
                raw += file.read()
            if len(raw) > CODE_BYTES:
                break
    numbers = torch.tensor(list(raw.encode("utf-8", "ignore")), dtype=torch.long)
    parts = numbers[: len(numbers) // 64 * 64].view(64, -1)
    kept_back = torch.arange(64) % 16 == 15
    return parts[~kept_back].reshape(-1), parts[kept_back].reshape(-1)
