"""A layer whose number of heads changes in the middle of a run begins anew, and no other."""

import json

import numpy as np

from stabmon.records import Reading, StabilityIssue
from stabmon.rules.evidence.own_past import own_past
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.issue_tracker import IssueTracker


def reading(step: int, counts: dict[str, int], **changes: np.ndarray) -> Reading:
    layers = {
        layer: {"max_logit": 10.0 * at + np.arange(heads) + step / 100}
        for at, (layer, heads) in enumerate(counts.items())
    }
    for layer, values in changes.items():
        layers[layer]["max_logit"] = values
    return Reading(step, 2.0, layers)


BEFORE, AFTER = {"a": 4, "b": 4, "c": 2}, {"a": 4, "b": 3, "c": 2}


def pruned() -> History:
    history = History(length=16, baseline_length=2)
    for step in range(1, 6):
        history.add(reading(step, BEFORE))
    for step in range(6, 10):
        history.add(reading(step, AFTER))
    return history


def test_other_layers_keep_their_past_and_the_pruned_one_begins_anew() -> None:
    history, whole = pruned(), History(length=16, baseline_length=2)
    for step in range(1, 10):
        whole.add(reading(step, BEFORE))
    rows = history.signal("max_logit")
    assert rows.shape == (9, 9)
    for layer in ("a", "c"):
        ours, theirs = history.of_layer(layer), whole.of_layer(layer)
        assert np.array_equal(rows[:, ours], whole.signal("max_logit")[:, theirs])
        assert np.array_equal(
            history.baseline("max_logit")[ours], whole.baseline("max_logit")[theirs]
        )
    b = history.of_layer("b")
    assert np.isnan(rows[:6, b]).all()
    assert np.isfinite(rows[6:, b]).all()
    assert np.allclose(history.baseline("max_logit")[b], [10.075, 11.075, 12.075])
    assert history.heads == [
        *(("a", h) for h in range(4)),
        *(("b", h) for h in range(3)),
        ("c", 0),
        ("c", 1),
    ]


def test_heads_may_be_added_too() -> None:
    history = History(length=16, baseline_length=2)
    history.add(reading(1, AFTER))
    history.add(reading(2, BEFORE))
    history.add(reading(3, BEFORE))
    assert history.signal("max_logit").shape == (3, 10)
    assert history.now("max_logit")[-2:].tolist() == [20.03, 21.03]


def test_a_signal_of_odd_length_moves_nothing() -> None:
    history = History(length=16, baseline_length=2)
    history.add(reading(1, BEFORE))
    odd = reading(2, BEFORE)
    odd.layers["b"]["attention_entropy"] = np.ones(3)  # type: ignore[index]
    history.add(odd)
    assert history.signal("max_logit").shape == (2, 10)
    assert np.isfinite(history.now("max_logit")).all()


def test_a_state_of_it_resumes() -> None:
    history = pruned()
    again = History(length=16, baseline_length=2)
    again.load_state_dict(json.loads(json.dumps(history.state_dict())))
    for each in (history, again):
        each.add(reading(10, AFTER))
    assert np.array_equal(again.signal("max_logit"), history.signal("max_logit"), equal_nan=True)
    assert again.heads == history.heads


class Large:
    """Finds heads above a score."""

    def check(self, history: History) -> list[StabilityIssue]:
        now = history.now("max_logit")
        return [
            StabilityIssue(
                history.latest.step, *history.heads[at], "logit_growth", "error", now[at], 50.0, ""
            )
            for at in np.flatnonzero(now > 50)
        ]


def test_an_issue_of_a_head_that_is_gone_closes() -> None:
    tracker = IssueTracker([Large()], history=History(length=16), cooldown_steps=0)  # type: ignore[list-item]
    opened = tracker.update(reading(1, BEFORE, b=np.array([1.0, 1.0, 1.0, 90.0])))
    assert [(issue.layer, issue.head) for issue in opened] == [("b", 3)]
    states = [[i.state for i in tracker.update(reading(step, AFTER))] for step in (2, 3, 4)]
    assert states == [[], [], ["closed"]]
    assert np.isnan(tracker.history.series("max_logit", opened[0])).all()
    assert own_past(tracker.history, opened[0], "max_logit") is not None
    assert tracker.open_issues == ()
