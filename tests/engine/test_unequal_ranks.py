"""Two processes whose weights, batches or snapshots are not the same."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import stabmon
from stabmon._torch.ranks.exchange import RankExchange
from stabmon.interventions import TrainingRun
from stabmon.interventions.run.equal_weights import make_equal
from stabmon.interventions.run.snapshots import Snapshot
from tests.support.rank_faults import Lines, Tiny
from tests.support.small_runs import weights
from tests.support.two_ranks import given_by, on_ranks

logger = logging.getLogger("stabmon")
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def run_of_rank(shift: float) -> TrainingRun:
    """Return a run after a step, with one weight of this rank moved by ``shift``."""
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model(torch.ones(2, 6, 32)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model.head.weight[0, 0] += shift
        optimizer.state[model.head.weight]["exp_avg"] += shift
    return TrainingRun(model, optimizer)


def make_all_equal(rank: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case, shift, sound in (
        ("equal", 0.0, True),
        ("one differs", 0.5 * rank, rank == 0),
        ("rank 0 is at fault", 0.5 * (rank == 0), rank == 1),
        ("all failed", 0.5 * rank, False),
    ):
        run, exchange = run_of_rank(shift), RankExchange()
        words = make_equal(run, exchange, sound=sound)
        moment = run.optimizer.state[run.model.head.weight]["exp_avg"].clone()
        found[case] = (words, weights(run.model), moment)
        exchange.close()
    return found


def join_unequal(rank: int, folder: str) -> dict[str, Any]:
    """Train on 3 batches on rank 0 and 6 on rank 1, with and without a monitor."""
    found: dict[str, Any] = {}
    log = Lines()
    for config in (None, "observe", "guard"):
        called = DistributedDataParallel(Tiny())
        optimizer = torch.optim.SGD(called.parameters(), 1e-2)
        generator = torch.Generator().manual_seed(rank)
        monitor: Any = None
        if config is not None:
            logger.addHandler(log)
            monitor = stabmon.AttentionStabilityMonitor(
                called, optimizer, config=config, log_every=1, sinks=[], reduce_ranks=True
            )
        with Join([called]):
            for _ in range(3 + 3 * rank):
                x = torch.randn(4, 6, 32, generator=generator)
                loss = called(x).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if monitor is not None:
                    monitor.on_step(loss)
        found[str(config)] = (
            weights(called.module),
            0 if monitor is None else len(monitor._tracker.history.readings),
        )
        if monitor is not None:
            found[f"{config} errors"] = dict(monitor.errors)
            monitor.close()
            logger.removeHandler(log)
    return found | {"lines": log.lines}


def take_snapshot(rank: int, folder: str) -> dict[str, Any]:
    """Save this rank's snapshot, and look at the other rank's."""
    run = run_of_rank(float(rank))
    own = Snapshot.take(run)
    own.save(Path(folder, f"{rank}.snapshot"))
    dist.barrier()
    other = Snapshot.load(Path(folder, f"{1 - rank}.snapshot"))
    return {
        "own": own.digest(),
        "read": Snapshot.load(Path(folder, f"{rank}.snapshot")).digest(),
        "other": other.digest(),
        "fits": [own.explain_misfit(run), other.explain_misfit(run)],
    }


WORKS = (make_all_equal, join_unequal, take_snapshot)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank returned from every function in ``WORKS``."""
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(WORKS, folder)
    given = [given_by(work, folder) for work in WORKS]
    return [
        {work.__name__: each[rank] for work, each in zip(WORKS, given, strict=True)}
        for rank in range(2)
    ]


def of(found: list[dict[str, Any]], name: str, case: str) -> list[Any]:
    return [each[name][case] for each in found]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_weights_and_moments_that_differ_become_those_of_the_first_sound_rank(found) -> None:
    (_, sound, moment), _ = of(found, "make_all_equal", "equal")
    for case, source in (("one differs", 0), ("rank 0 is at fault", 1)):
        ranks = of(found, "make_all_equal", case)
        for words, own, own_moment in ranks:
            assert words == f"weights of all ranks are those of rank {source} again"
            assert same(own, sound)
            assert torch.equal(own_moment, moment)


def test_equal_weights_stay_and_without_a_sound_rank_none_is_copied(found) -> None:
    assert [words for words, *_ in of(found, "make_all_equal", "equal")] == ["", ""]
    first, second = of(found, "make_all_equal", "all failed")
    assert first[0] == second[0]
    assert "start again from a checkpoint" in first[0]
    assert not same(first[1], second[1])


def test_under_join_unequal_batches_train_as_unwatched_and_each_rank_reports_its_own(found) -> None:
    for number, each in enumerate(found):
        joined = each["join_unequal"]
        unwatched, _ = joined["None"]
        for config in ("observe", "guard"):
            trained, readings = joined[config]
            assert same(trained, unwatched), config
            assert readings == 3 + 3 * number
            assert joined[f"{config} errors"] == {}
        assert sum("Join" in line for line in joined["lines"]) == 2, joined["lines"]


def test_a_digest_is_of_its_rank_and_a_snapshot_of_another_rank_is_refused(found) -> None:
    first, second = (each["take_snapshot"] for each in found)
    assert first["own"] == first["read"] == second["other"]
    assert second["own"] == second["read"] == first["other"]
    assert first["own"] != second["own"]
    for number, each in enumerate((first, second)):
        own, other = each["fits"]
        assert own == ""
        assert f"is the state of rank {1 - number}" in other
