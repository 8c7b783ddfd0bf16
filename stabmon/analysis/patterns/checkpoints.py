"""Temporary loading of checkpoints into a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def step_of(checkpoint: Any, index: int) -> int:
    """Return the last number in the name of a path, else ``index``.

    Args:
        checkpoint: a path, or anything else.
        index: the checkpoint's place in its list.

    Example:
        >>> step_of("runs/a/checkpoint-500", 3), step_of({}, 3)
        (500, 3)
    """
    if isinstance(checkpoint, str | Path):
        numbers = re.findall(r"\d+", Path(checkpoint).stem)
        if numbers:
            return int(numbers[-1])
    return index


@contextmanager
def restored(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Restore a model's parameters and buffers, bit for bit, at the end of a block.

    Yields:
        A function that restores them at once.
    """
    tensors = [*model.parameters(), *model.buffers()]
    kept = [tensor.detach().clone() for tensor in tensors]

    def reset() -> None:
        with torch.no_grad():
            for tensor, old in zip(tensors, kept, strict=True):
                tensor.copy_(old)

    try:
        yield reset
    finally:
        reset()


def read_checkpoint(model: nn.Module, checkpoint: Mapping[str, Tensor] | str | Path) -> None:
    """Load weights into a model.

    Args:
        model: the model.
        checkpoint: a state dict, a file, or a folder with ``model*.safetensors`` or
            ``pytorch_model*.bin``. Tied weights may be missing.

    Raises:
        ValueError: if it cannot be read, or does not fit the model.
    """
    name = "the state dict" if isinstance(checkpoint, Mapping) else str(checkpoint)
    state = dict(checkpoint) if isinstance(checkpoint, Mapping) else _read(Path(checkpoint))
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{name} does not fit the model: {str(error).splitlines()[-1]}") from None
    own = model.state_dict(keep_vars=True)
    loaded = {own[key].data_ptr() for key in state if key in own}
    absent = [key for key in missing if own[key].data_ptr() not in loaded]
    if absent or unexpected:
        what = f"lacks {absent[0]}" if absent else f"has {unexpected[0]}, which the model has not"
        raise ValueError(f"{name} does not fit the model: it {what}")


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        if not files:
            raise ValueError(f"{path}: holds no model*.safetensors and no pytorch_model*.bin")
    else:
        files = [path]
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= _read_file(file)
        except Exception as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(f"{file}: cannot be read ({reason})") from None
    return state


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = load_file(file)
        return tensors
    found = torch.load(file, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        raise ValueError("holds no state dict")
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}
