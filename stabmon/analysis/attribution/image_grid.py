"""Grid of image patches behind a model's tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stabmon.analysis.chunks import named_inputs
from stabmon.capture.names import clean_name

MOST_LEADING = 16
"""Largest number of special tokens before the patches.

These are class and distillation tokens, and registers.
"""


def image_grid(
    model: nn.Module, batch: Any, tokens: int, stack: str | None = None
) -> dict[str, int] | None:
    """Return the grid ``{"rows", "cols", "leading"}`` of image patches, or None.

    Patches are the output of a convolution with a stride of its own width; the tokens left over by
    the grid are assumed to stand before.

    Args:
        model: the model.
        batch: its input.
        tokens: number of tokens of the attention.
        stack: part of the convolution's name, for a model with several stacks.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4))
        >>> image_grid(model, torch.randn(1, 3, 16, 32), 33)
        {'rows': 4, 'cols': 8, 'leading': 1}
    """
    # YOLOS: detection tokens stand last
    tokens -= int(getattr(getattr(model, "config", None), "num_detection_tokens", 0) or 0)
    images = [
        each
        for each in named_inputs(batch).values()
        if isinstance(each, Tensor) and each.ndim == 4 and each.is_floating_point()
    ]
    for name, module in model.named_modules():
        if (
            not isinstance(module, nn.Conv2d)
            or module.stride != module.kernel_size
            or module.kernel_size == (1, 1)
        ):
            continue
        if stack is not None and stack not in clean_name(name).split("."):
            continue
        for image in images:
            if image.shape[1] != module.in_channels:
                continue
            rows, cols = (
                int(image.shape[2 + i] + 2 * _padding(module, i)) // int(module.stride[i])
                for i in (0, 1)
            )
            if 0 <= tokens - rows * cols <= MOST_LEADING and rows * cols > 1:
                return {"rows": rows, "cols": cols, "leading": tokens - rows * cols}
    return None


def _padding(module: nn.Conv2d, side: int) -> int:
    padding = module.padding
    return 0 if isinstance(padding, str) else int(padding[side])
