"""Settings of a check, and the levels it judges by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from stabmon._settings import Bounds, Count, Fraction, Layer, Positive, check, read
from stabmon._settings.layers import Misfit, Reads

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
DTYPE_NAMES = {
    "fp16": ("float16", "half", "f16"),
    "bf16": ("bfloat16",),
    "fp32": ("float32", "float", "f32"),
}
"""Precision -> its other names, also after ``torch.``."""
ATTENTION = {"sdpa": "sdpa", "eager": "eager", "flex": "flex_attention"}
"""Name of each implementation on the command line, and in transformers."""


class Precision(Reads):
    """A precision by any of its names, or torch's own object."""

    def read(self, layers: Sequence[Layer], key: str) -> str:
        """Return the short name.

        Raises:
            SettingsError: for an unknown precision.
        """
        given = layers[-1].value
        if not isinstance(given, str | torch.dtype):
            raise Misfit
        name = str(given).lower().removeprefix("torch.")
        for short, others in DTYPE_NAMES.items():
            if name == short or name in others:
                return short
        known = ", ".join(f"{name} ({', '.join(each)})" for name, each in DTYPE_NAMES.items())
        raise layers[-1].error(key, f"unknown precision {str(given)!r}. Known: {known}")

    def describe(self) -> str:
        """Return the words for a precision."""
        return "the name of a precision"


@dataclass(frozen=True)
class CheckConfig:
    """Settings of a check.

    Raises:
        ValueError: for a value of the wrong type or size.

    Example:
        >>> config = CheckConfig(dtype="bf16", seq_len=2048)
        >>> config.torch_dtype, config.rows
        (torch.bfloat16, 64)
    """

    dtype: Annotated[str, Precision()] = "fp32"
    """Precision to train in: ``fp16``, ``bf16`` or ``fp32``, by any of torch's names. Half
    precision is autocast, weights staying as they are.
    """
    seq_len: Annotated[int, Bounds(2)] | None = None
    """Length to train at, in tokens; None for the sample's own."""
    seed: int = 0
    """Seed of random tokens, of weights that are made for the check, and of dropout."""
    rows: Annotated[int, Bounds(2)] = 64
    """Query rows per head, spread over the positions, on which rounding is tried out."""
    condensed_warning: Fraction = 0.5
    """Share of ln n, in [0, 1], below which the entropy expected at initialisation is a warning:
    half of all spread is gone.
    """
    moved_warning: Fraction = 0.05
    """Probability that rounding moves in a head's mean row, in [0, 1], from which on it is a
    warning; twice that is an error.
    """
    product_warning: Positive = 16_384.0
    """Largest float16 product of query and key that is no warning, a quarter of the range; twice
    that is an error.
    """
    least_head_dim: Count = 16
    """Head dimension below which a head is worth a warning."""
    region: bool = False
    """Also work out the stability region about the model."""
    damaged: Positive = 10.0
    """Times the median of the other heads that a head's weights must be to stand out."""

    def __post_init__(self) -> None:
        check(self, "check config")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Precision to train in."""
        return DTYPES[self.dtype]


def check_config(
    config: CheckConfig | Mapping[str, Any] | str | None, source: str = "check config"
) -> CheckConfig:
    """Return the settings of a :class:`CheckConfig`, a mapping of its fields, or a dtype's name.

    Args:
        config: see above; None for the defaults.
        source: name of the mapping in messages.

    Raises:
        ValueError: for an unknown field, or a value of the wrong type or size.

    Example:
        >>> check_config("bfloat16").dtype, check_config({"dtype": torch.float16}).dtype
        ('bf16', 'fp16')
    """
    if isinstance(config, CheckConfig):
        return config
    if isinstance(config, str):
        config = {"dtype": config}
    return read(CheckConfig, Layer(config or {}, source))
