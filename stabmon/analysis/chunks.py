"""Runs of a batch in parts, halved when memory runs out."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stabmon.model_names import BATCHED_INPUTS, UNBATCHED_INPUTS

logger = logging.getLogger("stabmon")

T = TypeVar("T")
SMALL_WORK = 10**10
"""Parameters times tokens of a forward of about one second on one thread."""
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "DefaultCPUAllocator",
    "Cannot allocate memory",
)
"""Messages of allocators at the end of memory.

torch's CPU allocator raises a plain RuntimeError (checked with torch 2.13); a changed message would
end the run instead of halving the batch.
"""


def in_chunks(
    batch: Any,
    run: Callable[[Any, int], T],
    merge: Callable[[Sequence[T]], T],
    chunk_size: int | None = None,
    *,
    dim: int = 0,
) -> T:
    """Run a function on a batch, in parts if one run needs too much memory.

    Args:
        batch: a mapping of arguments, a tuple of them, or a tensor.
        run: takes a part of the batch and the number of its first sample.
        merge: makes one result of the parts' results.
        chunk_size: samples in a part; None for all. A part that runs out of memory is halved, and
            so are the later ones.
        dim: dimension of the samples in tensors of three dimensions, 1 for ``[S, B, C]``.

    Returns:
        The result of ``run``, or the merged results.

    Raises:
        ValueError: for a chunk size below 1, or a batch that cannot be divided.
        RuntimeError: the allocator's own, if one sample is too much.

    Example:
        >>> batch = torch.arange(6).view(3, 2)
        >>> in_chunks(batch, lambda part, start: part.sum(1), torch.cat, chunk_size=2)
        tensor([1, 5, 9])
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size!r}: give 1 or more samples")
    if chunk_size is None:
        result, error = _attempt(run, batch, 0)
        if error is None:
            return result  # type: ignore[return-value]
        samples = sample_count(batch, dim)
        if samples == 1:
            raise error
        size = _halved(samples, samples)
    else:
        samples = sample_count(batch, dim)
        size = min(chunk_size, samples)
    parts: list[T] = []
    start, warned = 0, chunk_size is None
    while start < samples:
        whole = size >= samples
        result, error = _attempt(
            run, batch if whole else part_of(batch, start, start + size, dim), start
        )
        if error is None:
            parts.append(result)  # type: ignore[arg-type]
            start += size
        elif size == 1:
            raise error
        else:
            size = _halved(size, samples, quiet=warned)
            warned = True
    return merge(parts)


@contextmanager
def reproducible(model: nn.Module, batch: Any) -> Iterator[None]:
    """Let small work on a CPU run on one thread, for results independent of the batch.

    With one thread a row of a matrix product has the same bits however many rows there are
    (measured with MKL, torch 2.13: 2 to 16 samples of 5 to 128 tokens, widths 32 to 256). With
    several threads, rows are distributed by their number, and the last bits change with it (up to
    1e-6 in logits). Larger work keeps its threads, and so does work on other devices.

    Args:
        model: the model; its parameters count for the size of the work.
        batch: the model's input.
    """
    tensors = [each for each in named_inputs(batch).values() if isinstance(each, Tensor)]
    parameters = sum(each.numel() for each in model.parameters())
    tokens = max(
        (
            each.numel() // (each.shape[-1] if each.is_floating_point() else 1)
            for each in tensors
            if each.ndim
        ),
        default=0,
    )
    threads = torch.get_num_threads()
    is_small = parameters * tokens <= SMALL_WORK and all(
        each.device.type == "cpu" for each in tensors
    )
    if threads == 1 or not is_small:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _attempt(
    run: Callable[[Any, int], T], part: Any, start: int
) -> tuple[T | None, BaseException | None]:
    """Return the result of ``run``, or the out-of-memory error without its frames."""
    try:
        return run(part, start), None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        failed = error
    link: BaseException | None = failed
    while link is not None:  # frames would keep the run's tensors
        link.__traceback__, link = None, link.__cause__ or link.__context__
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
    return None, failed


def _halved(size: int, samples: int, *, quiet: bool = False) -> int:
    half = -(-size // 2)
    if not quiet:
        logger.warning(
            "memory ran out with %d samples at once: continuing with %d of %d", size, half, samples
        )
    return half


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in OUT_OF_MEMORY)


def sample_count(batch: Any, dim: int = 0) -> int:
    """Return the number of samples in a batch.

    Args:
        batch: a mapping of arguments, a tuple of them, or a tensor.
        dim: dimension of the samples in tensors of three dimensions.

    Raises:
        ValueError: if no tensor has a batch dimension.
    """
    named = named_inputs(batch)
    for name in (*BATCHED_INPUTS, *named):
        value = named.get(name)
        if isinstance(value, Tensor) and value.ndim and name not in UNBATCHED_INPUTS:
            return int(value.shape[dim if value.ndim == 3 else 0])
    raise ValueError("the batch holds no tensor with samples: it cannot be run in parts")


def part_of(batch: Any, start: int, stop: int, dim: int = 0) -> Any:
    """Return samples ``start`` to ``stop`` of a batch, in its own form.

    Args:
        batch: a mapping of arguments, a tuple of them, or a tensor.
        start, stop: first sample, and the one after the last.
        dim: dimension of the samples in tensors of three dimensions.
    """
    samples, named = sample_count(batch, dim), named_inputs(batch)

    def part(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim or name in UNBATCHED_INPUTS:
            return value
        if dim == 1 and value.ndim == 3 and value.shape[1] == samples:
            return value[:, start:stop]
        return value[start:stop] if value.shape[0] == samples else value

    parts = {name: part(name, value) for name, value in named.items()}
    if isinstance(batch, Tensor):
        return parts["0"]
    return parts if isinstance(batch, Mapping) else type(batch)(parts.values())


def named_inputs(batch: Any) -> dict[str, Any]:
    """Return the inputs of a batch by name, else by position."""
    if isinstance(batch, Tensor):
        return {"0": batch}
    if isinstance(batch, Mapping):
        return dict(batch)
    return {str(index): value for index, value in enumerate(batch)}
