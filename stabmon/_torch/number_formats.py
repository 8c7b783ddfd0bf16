"""Precision and range of the floating-point formats, by name.

A format is named as torch prints its dtype, without the leading ``torch.``.
"""

from __future__ import annotations

import math

import torch

_FORMATS = {
    name: torch.finfo(getattr(torch, name))
    for name in ("bfloat16", "float16", "float32", "float64")
}

MANTISSA_BITS = {name: 1 - round(math.log2(each.eps)) for name, each in _FORMATS.items()}
"""Bits of precision, the implicit leading one included: 8, 11, 24 and 53."""
LARGEST = {name: float(each.max) for name, each in _FORMATS.items()}
"""Largest finite value; 65504 in float16, above 3e38 in bfloat16 and float32."""
FLOAT16_OVERFLOW = LARGEST["float16"] + 16
"""Least magnitude that float16 rounds to inf, 65520: half a unit in the last place above 65504."""
TOTAL_VARIATION = 0.1
"""Share of a row's probability that rounding its scores may move."""
SCORE_ERROR = 2 * math.atanh(TOTAL_VARIATION)
"""Largest error of scores that moves a softmax by at most :data:`TOTAL_VARIATION`.

Scores that are off by at most eta move a softmax by at most ``tanh(eta / 2)`` in total variation.
"""


def format_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype's format.

    >>> format_of(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def bits_averaged(head_dim: int) -> float:
    """Return the bits that a kernel gains by accumulating scores in float32.

    Only query and key are rounded then, ``head_dim`` times with independent signs, so that the
    error of their product is about ``sqrt(head_dim / 2)`` times smaller.

    >>> bits_averaged(128)
    3.0
    """
    return 0.5 * math.log2(max(head_dim, 2) / 2)
