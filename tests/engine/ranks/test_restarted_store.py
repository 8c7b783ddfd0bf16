"""Ranks that torchrun restarts read nothing that the ranks before them left in the store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from stabmon._torch.process_group import default_store


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("machines", "is_left"), [(1, False), (2, True)])
def test_words_of_an_earlier_attempt_are_not_read(
    monkeypatch: pytest.MonkeyPatch, machines: int, is_left: bool
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", str(2 * machines))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    default_store().set("resume/1", "12")
    for attempt in ("1", "2"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        # on several machines restarts are counted otherwise on each, and the name must be common
        assert default_store().check(["resume/1"]) == is_left
        default_store().set("resume/1", "15")
    assert default_store().get("resume/1") == b"15"
