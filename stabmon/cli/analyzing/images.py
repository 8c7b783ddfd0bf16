"""Images from a folder, as a vision model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabmon.check.loading import pretrained
from stabmon.check.loading.source import LoadedModel

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def image_files(source: str, kind: str) -> list[Path]:
    """Return a folder's images sorted by name, or the one image.

    Args:
        source: folder or file.
        kind: name of the model, for errors.

    Returns:
        The files.

    Raises:
        ValueError: if there is none.
    """
    path = Path(source)
    if not path.exists():
        raise ValueError(
            f"--text {source}: no such file or folder; {kind} reads images: give a folder of them"
        )
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(
                f"--text {source}: {kind} reads images; give a folder of them "
                f"({', '.join(SUFFIXES[:4])})"
            )
        return [path]
    files = sorted(each for each in path.iterdir() if each.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(
            f"--text {source}: holds no images; give a folder with {', '.join(SUFFIXES[:4])} files"
        )
    return files


def read_images(files: Sequence[Path], target: LoadedModel) -> tuple[Tensor, np.ndarray, list[str]]:
    """Read images with the processor beside the model, or resized and scaled to [-1, 1].

    Args:
        files: the images.
        target: the loaded model.

    Returns:
        ``[B, channels, height, width]`` for the model, ``[B, height, width, 3]`` uint8 as it sees
        them, and notes.

    Raises:
        ValueError: if one cannot be read.
        ImportError: if pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('pillow is not installed: pip install "stabmon[report]"') from error
    config = target.config
    channels = int(getattr(config, "num_channels", 3))
    pictures = []
    for file in files:
        try:
            with Image.open(file) as read:
                pictures.append(read.convert("L" if channels == 1 else "RGB"))
        except OSError as error:  # pillow's own error for what is no image is one
            raise ValueError(
                f"{file}: is no image that can be read ({error}); take it out of the folder"
            ) from None
    processor = (
        None if target.tokens_from is None else pretrained.image_processor_of(target.tokens_from)
    )
    if processor is not None:
        with pretrained.quiet():
            pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
        mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
        return pixels, _seen(pixels, mean, std), []
    size: Any = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    arrays = [
        np.asarray(
            each.resize((int(width), int(height)), Image.Resampling.BICUBIC), dtype=np.float32
        )
        for each in pictures
    ]
    stack = np.stack([each[..., None] if each.ndim == 2 else each for each in arrays]) / 255
    pixels = torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous() * 2 - 1
    note = (
        f"no image processor was found beside the model: images were resized to {width} × "
        f"{height} and scaled to [-1, 1]"
    )
    return pixels, _seen(pixels, [0.5] * channels, [0.5] * channels), [note]


def _seen(pixels: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> np.ndarray:
    """Return pixels without normalisation, ``[B, height, width, 3]`` uint8."""
    values = pixels.float().permute(0, 2, 3, 1).numpy()
    if mean is not None and std is not None:
        values = values * np.asarray(std) + np.asarray(mean)
    seen: np.ndarray = (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
    return np.repeat(seen, 3, axis=-1) if seen.shape[-1] == 1 else seen[..., :3]
