"""Two processes: weights in shards are clipped as whole ones are, and ranks decide and skip
together.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from stabmon._torch.ranks.exchange import RankExchange
from stabmon.guard import Guard, make_interventions
from stabmon.interventions.qk_clip import QkClip
from stabmon.interventions.skip_step import SkipStep
from tests.support.attention_zoo import zoo
from tests.support.intervention_runs import first_layer, growth, look, make_run, scores_of
from tests.support.two_ranks import given_by, on_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes returned from every function in ``WORKS``."""
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(WORKS, folder)
    given = [given_by(work, folder) for work in WORKS]
    return [
        {work.__name__: each[rank] for work, each in zip(WORKS, given, strict=True)}
        for rank in range(2)
    ]


def clip_sharded(rank: int, folder: str) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    out: dict[str, Any] = {}
    for name in ("llama-sdpa", "gpt2-sdpa", "gemma3-sdpa"):
        model, inputs = zoo()[name]()
        fully_shard(model)
        run = make_run(model, inputs)
        run.exchange = RankExchange()
        model.reshard()
        layer = first_layer(run)
        before = scores_of(run)[layer]
        model.reshard()  # as after a backward
        bits = [p.to_local().clone() for p in model.parameters()]
        applied = QkClip(target=float(before[1]) / 4, hold=False).apply(run, growth(layer))
        after = scores_of(run)[layer]
        model.reshard()
        exact = applied.undo()
        same = all(
            torch.equal(p.to_local(), b) for p, b in zip(model.parameters(), bits, strict=True)
        )
        out[name] = (before.tolist(), after.tolist(), exact, same, applied.record["note"])
    return out


def test_shards_are_clipped_as_whole_weights_are_and_undone_to_the_bit(
    found: list[dict[str, Any]],
) -> None:
    for rank in found:
        for name, (before, after, exact, same, note) in rank["clip_sharded"].items():
            shared = name.startswith("gemma3")
            expected = [b / 4 if shared or head == 1 else b for head, b in enumerate(before)]
            assert after == pytest.approx(expected, rel=1e-5), name
            assert exact
            assert same
            assert "not proven" in note


def skip_together(rank: int, folder: str) -> list[bool]:
    model = nn.Linear(2, 2)
    run = make_linear(model)
    SkipStep().apply(run)
    kept = []
    for bad_rank in (None, 0, 1):
        model.weight.grad = torch.full_like(model.weight, float("nan") if rank == bad_rank else 1.0)
        run.step_hooks.fire("before_optimizer_step")
        kept.append(model.weight.grad is not None)
    return kept


def make_linear(model: nn.Module) -> Any:
    from stabmon.interventions import TrainingRun

    run = TrainingRun(model, torch.optim.SGD(model.parameters(), lr=0.1))
    run.exchange = RankExchange()
    return run


def test_a_step_is_skipped_on_all_ranks_if_on_any(found: list[dict[str, Any]]) -> None:
    assert [rank["skip_together"] for rank in found] == [[True, False, False]] * 2


def decide_together(rank: int, folder: str) -> dict[str, Any]:
    model, inputs = zoo()["llama-sdpa"]()
    run = make_run(model, inputs)
    run.exchange = RankExchange()
    layer = first_layer(run)
    guard = Guard(run, make_interventions({"qk_clip": {"target": 0.5}, "soften_logits": {}}))
    guard.begin()
    issues = [growth(layer)] if rank == 0 else []  # what rank 1 believes does not count
    first = [each.intervention.name for each in guard.intervene(issues, True)]
    if rank == 1:
        run.layers = {}  # an act that fits on one rank only
        run.model = nn.Linear(1, 1)
    weights = [p.clone() for p in model.parameters()]
    second = [
        each.intervention.name
        for each in guard.intervene([growth(list(run.history.layers)[1], 0)], True)
    ]
    same = all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    return {"first": first, "second": second, "same": same, "weights": weights}


def test_rank_0_decides_and_what_does_not_fit_on_one_rank_is_done_on_none(
    found: list[dict[str, Any]],
) -> None:
    one, other = (rank["decide_together"] for rank in found)
    assert one["first"] == other["first"] == ["qk_clip"]
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], other["weights"], strict=True))
    assert one["second"] == other["second"] == []
    assert one["same"]
    assert other["same"]


def hold_together(rank: int, folder: str) -> list[float]:
    """Each rank sees other data; the clip is by the largest score of any.

    Rolled by five, the pair of tokens that scores highest in head 2 is torn apart; by less, both
    ranks see it.
    """
    model, inputs = zoo()["llama-sdpa"]()
    run = make_run(model, inputs)
    run.exchange = RankExchange()
    layer = first_layer(run)
    QkClip(target=0.5).apply(run, growth(layer, 2))
    with torch.no_grad():
        run.layers[layer].q_proj.weight.mul_(8)
    from stabmon.capture import AttentionCapture

    ids = torch.roll(inputs["input_ids"], 5 * rank, dims=1)
    with AttentionCapture(model, lambda call: run.step_hooks.fire("attention", call)):
        model(input_ids=ids)
    run.step_hooks.fire("on_step")
    look(run, {"input_ids": ids})
    return [run.max_logit(layer, 2), *run.layers[layer].q_proj.weight.flatten().tolist()]


WORKS = (clip_sharded, skip_together, decide_together, hold_together)


def test_a_held_clip_is_the_same_on_all_ranks_and_goes_by_the_largest_score_of_any(
    found: list[dict[str, Any]],
) -> None:
    one, other = (rank["hold_together"] for rank in found)
    assert one[1:] == other[1:]
    assert max(one[0], other[0]) == pytest.approx(0.5, rel=1e-5)
    assert abs(one[0] - other[0]) > 0.01
