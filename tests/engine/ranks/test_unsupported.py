"""Check that what is not supported over ranks is refused in one line, and trains on."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

import stabmon
from stabmon._torch.ranks.identity import has_flat_shards, runs_context_parallel
from tests.support.two_ranks import inputs, loss_of, whole

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_context_parallel_is_noticed_inside_its_context_alone() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh("cpu", (1,))
    assert not runs_context_parallel()
    with context_parallel(mesh, buffers=[torch.randn(1, 4)], buffer_seq_dims=[1]):
        assert runs_context_parallel()


class Summed(nn.Module):
    """Attention by hand, which runs on the CPU under context parallel too."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.q(x) @ self.k(x).mT / 32**0.5
        return x + torch.softmax(scores, -1) @ x


def test_attention_under_context_parallel_is_not_read_and_that_is_said_once(caplog) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    torch.manual_seed(0)
    model = Summed().train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    mesh = init_device_mesh("cpu", (1,))
    with stabmon.AttentionStabilityMonitor(model, optimizer, sinks=[], log_every=1) as monitor:
        for x, target in inputs(2):
            buffers = [x, target]
            with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1, 1]):
                loss = loss_of(model(x), target)
                loss.backward()
            optimizer.step()
            diagnosis = monitor.on_step(loss)
            assert diagnosis.stats == {}
    said = [each for each in caplog.messages if "context parallel is not supported" in each]
    assert len(said) == 1


def test_fsdp1_is_told_from_fsdp2() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    assert not has_flat_shards(fully_shard(whole(1)))
    assert not has_flat_shards(whole(1))
    assert has_flat_shards(FullyShardedDataParallel(whole(1), device_id=torch.device("cpu")))


def test_gradients_of_fsdp1_are_said_to_be_unwatched(caplog) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(whole(1), device_id=torch.device("cpu")).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    caplog.set_level(logging.INFO)
    with stabmon.AttentionStabilityMonitor(model, optimizer, sinks=[], log_every=1) as monitor:
        for x, target in inputs(4, rows=2):
            loss = loss_of(model(x), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            diagnosis = monitor.on_step(loss)
        assert diagnosis.readings[-1].gradients == {}
        assert dict(monitor.errors) == {}
    assert any("FSDP1" in each for each in caplog.messages)
