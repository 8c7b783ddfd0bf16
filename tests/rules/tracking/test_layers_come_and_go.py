"""Layers that appear late, miss readings, stay away or change their number of heads: no rule
raises, and none loses another's past.
"""

from dataclasses import replace

import numpy as np
import pytest

from stabmon.records import LayerInfo, QKUpdate, Reading
from stabmon.rules import RULES, History
from tests.support.sweeps import sweep
from tests.support.trajectories import falling_loss, shape, signals, tracker

SIGNALS = tuple(signals(np.ones((1, 1, 1)), np.ones((1, 1, 1))))
LAYERS = ("encoder.0", "encoder.1", "encoder.2", "encoder.2#1")


def wild(rng: np.random.Generator, heads: int, step: int) -> dict[str, np.ndarray]:
    """Signals that grow, fall, jump and are not finite, so that every rule has something to
    judge.
    """
    score = np.exp(rng.normal(1 + step / 40, 2, heads))
    score[rng.random(heads) < 0.1] = rng.choice([np.nan, np.inf, -5.0])
    entropy = rng.random(heads) ** rng.choice([1, 8])
    return {
        name: values[0, 0]
        for name, values in signals(score[None, None], entropy[None, None]).items()
    }


def come_and_go(seed: int, count: int = 60) -> list[Reading]:
    """Readings of layers each of which is there with its own chance and from its own first step
    on.
    """
    rng = np.random.default_rng(seed)
    chance, first = rng.uniform(0.2, 1.0, len(LAYERS)), rng.integers(0, count // 2, len(LAYERS))
    losses, found = falling_loss(count, seed=seed), []
    for t in range(count):
        present = [
            n
            for n, start, share in zip(LAYERS, first, chance, strict=True)
            if t >= start and rng.random() < share
        ]
        heads = {name: 3 if name == "encoder.1" and t > 40 else 4 for name in present}
        info = {
            n: LayerInfo(
                h, 16, 0.25 * 1.05**t, rng.choice(["float16", "float32"]), bool(rng.random() < 0.5)
            )
            for n, h in heads.items()
        }
        moved = {
            n: QKUpdate(1.0, 1.1**t, float(rng.choice([0.01, 0.2])) * 1.1**t)
            for n in present
            if rng.random() < 0.8
        }
        found.append(
            Reading(
                step=10 * (t + 1),
                loss=float(losses[t]),
                layers={n: wild(rng, h, t) for n, h in heads.items()},
                info=info,
                learning_rate=float(rng.choice([1e-4, 1e-2])),
                query_key=moved,
                gradients={"": 1.0, **{n: float(np.exp(rng.normal(0, 3))) for n in present}},
            )
        )
    return found


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("seed", sweep(range(8), keep=3))
def test_no_rule_raises_and_every_issue_is_of_a_layer_that_was_seen(seed: int) -> None:
    keeper = tracker(history=History(24), cooldown_steps=0)
    emitted = [issue for reading in come_and_go(seed) for issue in keeper.update(reading)]
    assert {issue.issue_type for issue in emitted} >= {"entropy_collapse", "logit_growth"}
    assert {issue.layer for issue in emitted} <= {None, *LAYERS}
    again = tracker(history=History(24), cooldown_steps=0)
    again.load_state_dict(keeper.state_dict())
    assert again.history.heads == keeper.history.heads


@pytest.mark.parametrize("name", list(RULES))
def test_a_layer_is_judged_alike_whether_or_not_another_comes_late(name: str) -> None:
    score, entropy = (
        shape(np.r_[np.full(12, 8.0), 200.0, 220.0], 0.01),
        shape(np.r_[np.full(12, 0.6), 0.01, 0.01]),
    )
    values = signals(score, entropy)
    alone, joined = tracker([RULES[name]()]), tracker([RULES[name]()])
    own = {"a": LayerInfo(4, 16, 0.25, "float16", False)}
    for t in range(len(score)):
        layers = {"a": {s: values[s][t, 0] for s in SIGNALS}}
        reading = Reading(10 * (t + 1), None, layers, info=own, learning_rate=1e-3)
        late = replace(
            reading,
            layers=layers | {"b": {s: values[s][t, 1] for s in SIGNALS}},
            info=own | {"b": own["a"]},
        )
        expected = alone.update(reading)
        emitted = joined.update(late if t in (7, 9) else reading)
        assert [str(i) for i in emitted if i.layer == "a"] == [str(i) for i in expected]


def test_a_baseline_asked_for_before_a_layer_came_is_of_all_heads_after() -> None:
    history = History(baseline_length=1)
    history.add(Reading(1, None, {"a": {"max_logit": np.ones(2)}}))
    assert history.baseline("max_logit").shape == (2,)
    history.add(Reading(2, None, {"b": {"entropy": np.ones(3)}}))
    np.testing.assert_array_equal(history.baseline("max_logit"), [1, 1, np.nan, np.nan, np.nan])


def test_a_layer_with_another_number_of_heads_is_missing_at_that_reading() -> None:
    history = History()
    for step, heads in enumerate((2, 3, 2)):
        history.add(Reading(step, None, {"a": {"max_logit": np.ones(heads)}}))
    np.testing.assert_array_equal(history.signal("max_logit"), [[1, 1], [np.nan, np.nan], [1, 1]])
