"""How records present themselves."""

import numpy as np

from stabmon.diagnosis import Diagnosis
from tests.support.sample_records import issue, non_finite, reading


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
