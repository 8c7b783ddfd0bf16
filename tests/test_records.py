"""Records as text and as plain values."""

from dataclasses import replace

import numpy as np
import pytest

from stabmon._storage import strict_json
from stabmon._storage.plain_record import PlainRecord
from stabmon.diagnosis import Diagnosis
from stabmon.records import LayerInfo, NonFinite, Overshoot, QKUpdate, Reading
from tests.support.sample_records import LAYERS, issue, non_finite, reading, same

OVERSHOOT = Overshoot(3, "torn", 0.25, 1.5, rates={"0.0": 1e-2}, fitting={"0.0": 1e-3})
FULL = reading(
    10,
    query_key={LAYERS[0]: QKUpdate(0.5, 2.0, 0.25)},
    non_finite=non_finite(9),
    overshoot=OVERSHOOT,
    learning_rates={"0.0": 1e-2},
    rate_factors={"0.0": 0.5},
    updates={"0.0": 1e-3},
    sampled=False,
)


@pytest.mark.parametrize(
    "record",
    [
        FULL.query_key[LAYERS[0]],
        OVERSHOOT,
        FULL.info[LAYERS[1]],
        replace(non_finite(9), cause="data", touched="weights", skipped=3, search=2, scale=2.0**16),
        issue(5, head=None, layer=None, eta_steps=12.5, state="worsened"),
    ],
    ids=lambda record: type(record).__name__,
)
def test_a_record_comes_back_from_its_plain_values(record: PlainRecord) -> None:
    line = strict_json.loads(strict_json.dumps(record.to_dict()))
    assert type(record).from_dict(line | {"of_a_later_version": 1}) == record


def test_a_reading_comes_back_from_its_plain_values_with_its_arrays() -> None:
    back = Reading.from_dict(strict_json.loads(strict_json.dumps(FULL.to_dict())))
    assert same(back, FULL)
    for name in ("query_key", "overshoot", "learning_rates", "rate_factors", "updates", "sampled"):
        assert getattr(back, name) == getattr(FULL, name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": 1.5}, "step is 1.5, not a whole number"),
        ({"losses": [[1]]}, r"losses.0 is \[1\], not a list of 2"),
        ({"query_key": {"h": {"gradient": 1.0}}}, "query_key.h has no 'weight'"),
        ({"overshoot": OVERSHOOT.to_dict() | {"how": "slowly"}}, "overshoot.how is 'slowly'"),
        ({"non_finite": {"step": 3}}, "non_finite has no 'kind'"),
    ],
)
def test_a_damaged_value_is_named(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Reading.from_dict(reading(10).to_dict() | changes)


def test_entries_that_old_records_lack_take_their_defaults() -> None:
    old = {"heads": 4, "head_dim": 8, "scale": 0.5, "dtype": "float16"}
    assert LayerInfo.from_dict(old) == LayerInfo(4, 8, 0.5, "float16")
    bad = {"step": 4, "kind": "loss", "layer": None, "head": None, "tensor": "loss"}
    assert NonFinite.from_dict(bad) == NonFinite(**bad)
    line = Reading.from_dict({"step": 2, "loss": None, "layers": {"h": {"max_logit": [1, 2]}}})
    assert line.layers["h"]["max_logit"].dtype == np.float64
    assert line.sampled


def test_a_diagnosis_is_one_line_that_counts_what_it_holds() -> None:
    found = (
        issue(50),
        issue(50, head=3, severity="warning"),
        issue(50, head=None, state="closed", severity="info"),
    )
    stats = {
        f"layers.{n}": {"max_logit": np.zeros(12), "attention_entropy": np.zeros(12)}
        for n in range(12)
    }
    diagnosis = Diagnosis(50, found, stats, tuple(reading(step) for step in range(50)), found[:1])
    assert repr(diagnosis) == (
        "Diagnosis(step=50, 12 layers, 144 heads, 3 issues: 1 error, 1 warning, 1 info, 1 open "
        "issue: 1 error)"
    )
    assert (
        repr(Diagnosis(1, (), {}))
        == "Diagnosis(step=1, 0 layers, 0 heads, 0 issues, 0 open issues)"
    )


def test_readings_and_issues_are_one_line_that_names_the_place() -> None:
    assert repr(reading(10)) == "Reading(step=10, loss=3.99, 2 layers, 8 heads)"
    assert repr(reading(10, loss=None, non_finite=non_finite(9))) == (
        "Reading(step=10, loss=unknown, 2 layers, 8 heads, non-finite parameter)"
    )
    told = "value 0.034, threshold 0.1"
    assert (
        repr(issue(3))
        == "StabilityIssue(error entropy_collapse, model.layers.1.self_attn head 2, step 3, "
        f"{told})"
    )
    closed = issue(3, layer=None, head=None, severity="info", state="closed")
    assert repr(closed) == f"StabilityIssue(info entropy_collapse, run, step 3, {told}, closed)"
