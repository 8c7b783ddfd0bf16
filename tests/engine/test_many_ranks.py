"""What ranks exchange at 10,000 of them, worked out by hand without processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from stabmon._torch.ranks import transport
from stabmon._torch.ranks.exchange import RankExchange
from stabmon._torch.ranks.transport import GATHERED, Transport
from stabmon.engine import rank_reducer
from stabmon.engine.rank_reducer import CONTROL, RankReducer
from stabmon.engine.ranks.losses import mean_losses, worst_losses
from stabmon.engine.ranks.offer import Offer
from stabmon.signals import SIGNALS, HeadSums

RANKS = range(0, 10_000, 10)
"""Numbers of the ranks that are packed, of 10,000."""
EVERY = 4


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_means_maxima_and_the_worst_loss_are_those_of_all_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reducer = RankReducer(nn.Linear(1, 1), RankExchange(), EVERY)
    reducer._agree_on([("h", "attention_entropy", 2), ("h", "max_logit", 2)])
    generator = torch.Generator().manual_seed(0)
    count = len(RANKS)
    entropies = torch.rand(count, 2, generator=generator)
    scores = torch.randn(count, 2, generator=generator)
    losses = torch.rand(count, generator=generator).tolist()
    losses[987] = 7.0
    added = largest = None
    for at, number in enumerate(RANKS):
        monkeypatch.setattr(rank_reducer, "rank", lambda number=number: number)
        ones = torch.ones(2, dtype=torch.float64)
        signals = {
            name: HeadSums(SIGNALS[name], values[at].double(), ones)
            for name, values in (("attention_entropy", entropies), ("max_logit", scores))
        }
        more, most = reducer._pack(
            Offer({"h": signals}, losses=[(9, losses[at])], ahead=1 + at % 3), step=9
        )
        added = more if added is None else added + more
        largest = most if largest is None else torch.maximum(largest, most)
    assert added is not None
    assert largest is not None
    assert -largest[1] == 1.0, "the soonest sample that a rank wishes for"
    rest = added[2 * EVERY :].reshape(2, -1), largest[CONTROL + EVERY :]
    found = reducer._unpack(*rest, {"h": {}})["h"]
    mean = found["attention_entropy"].total / found["attention_entropy"].count
    torch.testing.assert_close(mean, entropies.double().mean(0))
    assert torch.equal(found["max_logit"].total, scores.double().amax(0))
    ((step, mean_loss),) = mean_losses(9, added[: 2 * EVERY].reshape(2, EVERY))
    assert (step, mean_loss) == (9, pytest.approx(sum(losses) / count))
    assert worst_losses(9, largest[CONTROL : CONTROL + EVERY]) == ((9, 7.0, 9_870),)


@pytest.mark.parametrize(
    ("ranks", "numbers", "collectives", "has_own_group"),
    [
        (1, GATHERED, 1, True),
        (256, 1024, 1, True),
        (256, 1026, 2, True),
        (10_000, 20, 1, False),
        (10_000, 100, 2, False),
    ],
)
def test_a_step_is_gathered_while_that_is_short_and_reduced_where_it_is_long(
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
    numbers: int,
    collectives: int,
    has_own_group: bool,
) -> None:
    monkeypatch.setattr(dist, "ProcessGroupGloo", lambda *given: dist.group.WORLD)
    monkeypatch.setattr(transport, "world_size", lambda: ranks)
    made = Transport("many")
    assert (made._group is not None) is has_own_group
    calls: list[str] = []
    for name in ("all_gather", "all_reduce"):
        real = getattr(dist, name)
        monkeypatch.setattr(
            dist,
            name,
            lambda *given, name=name, real=real: (
                calls.append(name) or (name == "all_reduce" and real(*given))
            ),
        )
    made._group = None  # the default one, which has one rank
    values = torch.arange(numbers, dtype=torch.float64)
    added, largest = made.add_and_compare(values[: numbers // 2], values[numbers // 2 :])
    assert made.count == collectives
    assert calls == (["all_gather"] if collectives == 1 else ["all_reduce"] * 2)
    assert (len(added), len(largest)) == (numbers // 2, numbers - numbers // 2)
