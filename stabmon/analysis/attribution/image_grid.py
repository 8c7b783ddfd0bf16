"""Find the grid of image patches that a model's tokens are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stabmon.capture.names import clean_name

MOST_LEADING = 16
"""Special tokens before the patches: class and distillation tokens, registers."""


def image_grid(
    model: nn.Module, batch: Any, tokens: int, stack: str | None = None
) -> dict[str, int] | None:
    """Return ``{"rows", "cols", "leading"}`` where the tokens are patches of the batch's images;
    None elsewhere.

    Patches are what a convolution makes whose stride is its own width; the tokens that the grid
    leaves over are taken to stand before.

    Args:
        model: the model.
        batch: its input.
        tokens: how many tokens the attention has.
        stack: part of the convolution's name, where the model has several stacks.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4))
        >>> image_grid(model, torch.randn(1, 3, 16, 32), 33)
        {'rows': 4, 'cols': 8, 'leading': 1}
    """
    behind = (
        getattr(getattr(model, "config", None), "num_detection_tokens", 0) or 0
    )  # YOLOS: detection tokens stand last
    tokens -= int(behind)
    values = (
        [batch]
        if isinstance(batch, Tensor)
        else list(batch.values() if isinstance(batch, Mapping) else batch)
    )
    images = [
        each
        for each in values
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
