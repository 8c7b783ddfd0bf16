"""Run a batch in parts that halve when memory runs out."""

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
"""Parameters times tokens up to which one thread does a forward within about a second."""
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "DefaultCPUAllocator",
    "Cannot allocate memory",
)
"""Messages of allocators; torch's CPU allocator raises a plain RuntimeError (checked in 2.13)."""


def in_chunks(
    batch: Any,
    run: Callable[[Any, int], T],
    merge: Callable[[Sequence[T]], T],
    chunk_size: int | None = None,
    *,
    dim: int = 0,
) -> T:
    """Return what ``run`` makes of a batch, in parts where one run needs too much memory.

    Args:
        batch: a mapping of arguments, a tuple of them, or a tensor.
        run: is given a part of the batch and the number of its first sample.
        merge: makes one result of the parts'.
        chunk_size: samples in a part; None for all. A part that runs out of memory is halved, and
            so are the later ones.
        dim: dimension of the samples in tensors of three dimensions, 1 for ``[S, B, C]``.

    Raises:
        ValueError: for a chunk size below 1, or a batch that cannot be parted.
        RuntimeError: the allocator's own, if one sample is too much.

    Example:
        >>> in_chunks(torch.arange(6).view(3, 2), lambda part, start: part.sum(1), torch.cat, chunk_size=2)
        tensor([1, 5, 9])
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size!r}: give at least one sample")
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
    """Let small work on a CPU run on one thread, so that a sample's numbers do not depend on the
    samples beside it.

    With one thread a row of a matrix product has the same bits however many rows there are
    (measured with MKL, torch 2.13: 2 to 16 samples of 5 to 128 tokens, widths 32 to 256). With
    several, the rows are shared out by their number, and with it the last bits change (up to 1e-6
    in logits); larger work keeps its threads, and so does work on other devices.
    """
    tensors = [each for each in _named(batch).values() if isinstance(each, Tensor)]
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
    """Return the result of ``run``, or the out-of-memory error; hold nothing of a failed run."""
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
            "memory ran out with %d samples at once: going on with %d of %d", size, half, samples
        )
    return half


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in OUT_OF_MEMORY)


def sample_count(batch: Any, dim: int = 0) -> int:
    """Return the number of samples in a batch.

    Raises:
        ValueError: if no tensor tells it.
    """
    named = _named(batch)
    for name in (*BATCHED_INPUTS, *named):
        value = named.get(name)
        if isinstance(value, Tensor) and value.ndim and name not in UNBATCHED_INPUTS:
            return int(value.shape[dim if value.ndim == 3 else 0])
    raise ValueError("the batch holds no tensor with samples: it cannot be run in parts")


def part_of(batch: Any, start: int, stop: int, dim: int = 0) -> Any:
    """Return samples ``start`` to ``stop`` of a batch, in its own form."""
    samples, named = sample_count(batch, dim), _named(batch)

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


def _named(batch: Any) -> dict[str, Any]:
    if isinstance(batch, Tensor):
        return {"0": batch}
    if isinstance(batch, Mapping):
        return dict(batch)
    return {str(index): value for index, value in enumerate(batch)}
