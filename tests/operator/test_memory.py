"""No engine that is meant for training ever holds Q x K numbers, with any mask."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stabmon.operator import STATISTICS, attention_operator
from stabmon.signals import SIGNALS, measure


class Memory(TorchDispatchMode):
    """Largest single tensor and peak of live bytes among all storages made while this is on."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), ours=False)
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), ours=True)
        return result

    def _count(self, storage: torch.UntypedStorage, ours: bool) -> None:
        """What is first met as an argument came from outside, and costs nothing."""
        key, size = storage._cdata, storage.nbytes() if ours else 0
        if key not in self._seen:
            self._seen.add(key)
            self.live += size
            self.largest, self.peak = max(self.largest, size), max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


MASKS: dict[str, Callable[[int], dict[str, Any]]] = {
    "none": lambda s: {},
    "causal": lambda s: {"is_causal": True},
    "causal window": lambda s: {"is_causal": True, "window": s // 4},
    "bool mask": lambda s: {"mask": torch.ones(1, 1, s, s, dtype=torch.bool).tril()},
    "bool mask with holes": lambda s: {
        "mask": torch.rand(1, 1, s, s, generator=torch.Generator().manual_seed(0)) > 0.5
    },
    "additive mask": lambda s: {
        "mask": torch.zeros(1, 1, s, s).masked_fill(
            torch.ones(s, s, dtype=torch.bool).triu(1), -1e38
        )
    },
    "key padding and causal": lambda s: {
        "mask": torch.arange(s)[None, None, None] > 5,
        "is_causal": True,
    },
    "pairwise bias": lambda s: {"mask": torch.linspace(-1, 1, s * s).view(1, 1, s, s)},
}


def peak_of(
    length: int, engine: str, options: dict[str, Any], act: Callable[[Any], object]
) -> Memory:
    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(1, 4, length, 8, generator=generator),
        torch.randn(1, 2, length, 8, generator=generator),
    )
    gc.collect()
    with Memory() as memory:
        act(attention_operator(query, key, scale=0.3, engine=engine, **options))
    return memory


def everything(operator: Any) -> None:
    operator.prepare(STATISTICS)
    operator.matvec(torch.ones(1, 1, operator.keys, 2))
    operator.rmatvec(torch.ones(1, 1, operator.queries, 2))
    measure(operator, list(SIGNALS))


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Room for blocks grows with the threads, not with the length."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


ENGINES = ("blockwise", "fused")
PAIRS = [
    # two masks with one engine each, all others in the long tests
    pytest.param(kind, engine, marks=[] if at in (2, 3) and at % 2 == turn else pytest.mark.long)
    for at, kind in enumerate(MASKS)
    for turn, engine in enumerate(ENGINES)
]


@pytest.mark.parametrize(("kind", "engine"), PAIRS)
def test_memory_is_linear_in_the_length(kind: str, engine: str) -> None:
    """Twice the length takes at most about twice the memory, not four times as much, and far less
    than the scores would.
    """
    short, long = (
        peak_of(length, engine, MASKS[kind](length), everything) for length in (1536, 3072)
    )
    scores = 4 * 3072 * 3072 * 4
    assert long.largest < scores / 40
    assert long.peak < scores / 15
    assert long.peak < 2.3 * short.peak


def test_the_oracle_is_not_for_training() -> None:
    """What the test above must be able to see."""
    memory = peak_of(
        1024, "dense", {"is_causal": True}, lambda operator: operator.prepare({"entropy"})
    )
    assert memory.largest >= 4 * 1024 * 1024 * 8
