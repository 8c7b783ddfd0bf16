"""Check that what ranks pack, added up and compared elementwise, is what all saw together."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from stabmon._torch.ranks.exchange import RankExchange
from stabmon.engine.rank_reducer import RankReducer
from stabmon.engine.ranks.losses import with_rank, without_rank
from stabmon.engine.ranks.offer import layout_of
from stabmon.signals import SIGNALS, HeadSums

NAMES = ("attention_entropy", "max_logit")
"""A mean and a maximum."""


def sums(seed: int, heads: int = 3) -> dict[str, dict[str, HeadSums]]:
    """What one rank measured of two layers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: {
            name: HeadSums(
                SIGNALS[name],
                torch.randn(heads, generator=generator),
                torch.randint(1, 9, (heads,), generator=generator).double(),
            )
            for name in NAMES
        }
        for layer in ("first", "second")
    }


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def reducer(agreed: list[tuple[str, str, int]]) -> RankReducer:
    """A reducer that has agreed with the others, as it has after the first sampled step."""
    made = RankReducer(nn.Linear(1, 1), RankExchange(), 50)
    made._agree_on(agreed)
    return made


def reduced(*ranks: dict[str, dict[str, HeadSums]]):
    """The signals over all ranks, as rank 0 unpacks them: the collectives, done by hand."""
    agreed = layout_of(ranks[0])
    packed = [reducer(agreed)._pack_signals(own) for own in ranks]
    added = torch.stack([each for each, _ in packed]).sum(0)
    largest = torch.stack([each for _, each in packed]).amax(0)
    own = {layer: dict(signals) for layer, signals in ranks[0].items()}
    return reducer(agreed)._unpack(added, largest, own)


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for layer, signals in expected.items():
        for name, each in signals.items():
            now = found[layer][name]
            torch.testing.assert_close(now.total.double(), each.total.double(), equal_nan=True)
            torch.testing.assert_close(now.count.double(), each.count.double())


def merged(*ranks):
    first, *others = ranks
    for other in others:
        first = {
            layer: {name: each.merge(other[layer][name]) for name, each in signals.items()}
            for layer, signals in first.items()
        }
    return first


def test_means_are_added_and_maxima_compared() -> None:
    ranks = [sums(seed) for seed in range(3)]
    assert_same(reduced(*ranks), merged(*ranks))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_a_nan_of_any_rank_is_the_nan_of_its_head_alone(rank: int, name: str) -> None:
    ranks = [sums(seed) for seed in range(2)]
    ranks[rank]["second"][name].total[1] = torch.nan
    found = reduced(*ranks)
    assert found["second"][name].total.isnan().tolist() == [False, True, False]
    assert_same(found, merged(*ranks))


def test_a_rank_with_other_layers_or_none_adds_nothing_and_keeps_the_length() -> None:
    whole, none = sums(0), {}
    narrow = sums(1, heads=2)
    assert_same(reduced(whole, none, narrow), whole)


def test_a_rank_whose_packing_fails_adds_nothing_and_says_so(caplog) -> None:
    whole, broken = sums(0), sums(1)
    nowhere = torch.zeros(3, device="meta")  # a tensor without values cannot be sent
    broken["first"][NAMES[0]] = HeadSums(SIGNALS[NAMES[0]], nowhere, nowhere)
    assert_same(reduced(whole, broken), whole)
    assert "this rank's readings are left out of a sampled step" in caplog.text


def test_heads_that_saw_nothing_anywhere_stay_empty() -> None:
    ranks = [sums(seed) for seed in range(2)]
    for own in ranks:
        own["first"]["max_logit"].total[0] = -torch.inf
        own["first"]["max_logit"].count[0] = 0
    found = reduced(*ranks)["first"]["max_logit"]
    assert found.value.isnan().tolist() == [True, False, False]


def test_packing_keeps_double_precision() -> None:
    ranks = [sums(seed) for seed in range(2)]
    total = 1.0 + 2.0**-40
    for own in ranks:
        own["first"]["attention_entropy"] = HeadSums(
            SIGNALS["attention_entropy"],
            torch.full((3,), total, dtype=torch.float64),
            torch.ones(3),
        )
    assert (reduced(*ranks)["first"]["attention_entropy"].total == 2 * total).all()


def test_a_signal_that_one_rank_lacks_leaves_its_others_in() -> None:
    whole, dropped = sums(0), sums(1)
    del dropped["first"]["max_logit"]
    found = reduced(whole, dropped)
    assert (found["first"]["max_logit"].total == whole["first"]["max_logit"].total).all()
    entropy = [each["first"]["attention_entropy"].total.double() for each in (whole, dropped)]
    assert torch.equal(found["first"]["attention_entropy"].total, sum(entropy))


@pytest.mark.parametrize("loss", [3.25, 0.0, 1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("number", [0, 1, 9_999])
def test_a_loss_carries_the_rank_that_it_is_of(loss: float, number: int) -> None:
    value, found = without_rank(with_rank(loss, number))
    assert found == number
    assert value == pytest.approx(loss if loss == loss else float("inf"), rel=1e-7)


def test_the_largest_loss_wins_with_its_rank() -> None:
    packed = [with_rank(loss, number) for number, loss in enumerate([2.0, 7.5, 3.0])]
    assert without_rank(max(packed)) == (7.5, 1)


def test_a_single_process_exchanges_nothing() -> None:
    assert not RankReducer(nn.Linear(1, 1), RankExchange(), 50).active
