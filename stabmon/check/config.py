"""What a check is told, and the levels it judges by."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ATTENTION = {"sdpa": "sdpa", "eager": "eager", "flex": "flex_attention"}
"""What the command calls an implementation, and what transformers does."""


@dataclass(frozen=True)
class CheckConfig:
    """Everything a check can be told.

    Raises:
        ValueError: naming the field, its value and what can be, for anything that cannot.
    """

    dtype: str = "fp32"
    """The precision to train in: ``fp16``, ``bf16`` or ``fp32``. Half precision is autocast,
    weights staying as they are.
    """
    seq_len: int | None = None
    """The length to train at, in tokens; None for the sample's own."""
    seed: int = 0
    """Of random tokens, of weights that are made for the check, and of dropout."""
    rows: int = 64
    """Query rows a head, spread over the positions, on which rounding is tried out."""
    condensed_warning: float = 0.5
    """Share of ln n, in [0, 1], below which the entropy expected at initialisation is a warning:
    half of all spread is gone.
    """
    moved_warning: float = 0.05
    """Probability that rounding moves in a head's mean row, in [0, 1], from which on it is a
    warning; twice that is an error.
    """
    product_warning: float = 16_384.0
    """Largest float16 product of query and key that is no warning, a quarter of the range; twice
    that is an error.
    """
    least_head_dim: int = 16
    """Head dimension below which a head is worth a warning."""
    region: bool = False
    """Also work out the stability region about the model."""
    damaged: float = 10.0
    """Times its siblings' median that a head's weights must be to stand out."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r}: use {', '.join(DTYPES)}")
        for name in ("seq_len", "rows"):
            value = getattr(self, name)
            if value is not None and (
                not isinstance(value, int) or isinstance(value, bool) or value < 2
            ):
                raise ValueError(f"{name} {value!r}: give a whole number of at least 2")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision to train in."""
        return DTYPES[self.dtype]


def check_config(config: CheckConfig | Mapping[str, Any] | str | None) -> CheckConfig:
    """The configuration that a :class:`CheckConfig`, a mapping of its fields, a dtype's name or
    None stands for.

    Raises:
        ValueError: for a field that is not known, or a value that cannot be.

    >>> check_config("bf16").dtype
    'bf16'
    """
    if config is None:
        return CheckConfig()
    if isinstance(config, CheckConfig):
        return config
    if isinstance(config, str):
        return CheckConfig(dtype=config)
    known = [f.name for f in dataclasses.fields(CheckConfig)]
    if unknown := sorted(set(config) - set(known)):
        raise ValueError(f"check config: unknown field {unknown[0]!r}. Known: {', '.join(known)}")
    return CheckConfig(**config)
