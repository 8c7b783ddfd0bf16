"""Check that what ranks pack, added up and compared elementwise, is what all saw together."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from stabmon.engine.rank_reducer import RankReducer
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


def layout_of(own: dict[str, dict[str, HeadSums]]) -> list[tuple[str, str, int]]:
    return [
        (layer, name, len(each.total))
        for layer, signals in own.items()
        for name, each in signals.items()
    ]


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def reducer(agreed: list[tuple[str, str, int]]) -> RankReducer:
    """A reducer that has agreed with the others, as it has after the first sampled step."""
    made = RankReducer(nn.Linear(1, 1))
    assert made._agree(agreed)
    return made


def reduced(*ranks: dict[str, dict[str, HeadSums]]):
    """The signals over all ranks, as rank 0 unpacks them: the collectives, done by hand."""
    agreed = layout_of(ranks[0])
    packed = [reducer(agreed)._pack(own, layout_of(own)) for own in ranks]
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


def test_ranks_wait_to_agree_until_all_have_something() -> None:
    made = RankReducer(nn.Linear(1, 1))
    assert not made._agree([])
    assert made._agreed is None
    assert made._agree(layout_of(sums(0)))


def test_a_single_process_keeps_its_own() -> None:
    own = sums(0)
    alone = RankReducer(nn.Linear(1, 1))
    assert not alone.active
    assert_same(alone.reduce(own)[0], own)
