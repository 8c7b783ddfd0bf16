"""Removal of tokens from a model's input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.analysis.forward import takes

Delete = Callable[[Any, Tensor], Any]
"""Function ``(batch, positions [B, k]) -> batch`` without these tokens."""


def deletion_of(
    model: nn.Module, batch: Any, replacement: int | None, grid: Mapping[str, int] | None
) -> tuple[Delete, str]:
    """Return a function to remove tokens from such a batch, and its description.

    Args:
        model: the model.
        batch: its input.
        replacement: a token id to put in their place; None to hide them.
        grid: see :func:`stabmon.analysis.attribution.image_grid.image_grid`.

    Raises:
        ValueError: if the input is of an unknown kind.
    """
    named = batch if isinstance(batch, Mapping) else {}
    if replacement is not None:
        ids = named.get("input_ids", batch)
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.ndim != 2:
            raise ValueError(
                "replacement is a token id, and the batch has no input_ids [B, S]: give a function "
                "as delete="
            )
        described = f"replaced by token {replacement}"
        return partial(_with_ids, replacement=replacement), described
    if grid is not None:
        return partial(_without_patches, grid=grid), "patches at the image's mean colour"
    text = named.get("input_ids", named.get("inputs_embeds"))
    if isinstance(text, Tensor) and takes(model, "attention_mask"):
        return _hidden, "hidden from attention"
    raise ValueError(
        "tokens of this input cannot be removed: give replacement=, a token id, or "
        "delete=, a function"
    )


def _with_ids(batch: Any, places: Tensor, replacement: int) -> Any:
    ids: Tensor = batch["input_ids"] if isinstance(batch, Mapping) else batch
    changed = ids.scatter(1, places.to(ids.device), replacement)
    return {**batch, "input_ids": changed} if isinstance(batch, Mapping) else changed


def _hidden(batch: Any, places: Tensor) -> Any:
    text = batch.get("input_ids", batch.get("inputs_embeds"))
    mask = batch.get("attention_mask")
    if mask is None:
        mask = torch.ones(text.shape[:2], dtype=torch.int64, device=text.device)
    return {**batch, "attention_mask": mask.scatter(1, places.to(mask.device), 0)}


def _without_patches(batch: Any, places: Tensor, grid: Mapping[str, int]) -> Any:
    """Set the pixels of patches to their image's mean, channel by channel."""
    name, images = next(
        (name, value)
        for name, value in (batch.items() if isinstance(batch, Mapping) else [("", batch)])
        if isinstance(value, Tensor) and value.ndim == 4
    )
    changed = images.clone()
    height, width = images.shape[2] // grid["rows"], images.shape[3] // grid["cols"]
    for index, row in enumerate(places.tolist()):
        for place in row:
            at = place - grid["leading"]
            if at < 0:
                continue  # a special token has no pixels
            top, left = at // grid["cols"] * height, at % grid["cols"] * width
            changed[index, :, top : top + height, left : left + width] = images[index].mean((1, 2))[
                :, None, None
            ]
    return {**batch, name: changed} if isinstance(batch, Mapping) else changed
