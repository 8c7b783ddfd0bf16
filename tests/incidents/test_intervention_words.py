"""Audit records as sentences."""

import pytest

from stabmon.incidents import intervention_text
from stabmon.incidents.intervention_words import VERBS, places_of


@pytest.mark.parametrize("action", [*VERBS, "renamed"])
def test_every_action_names_the_intervention(action: str) -> None:
    text = intervention_text({"intervention": "qk_clip", "action": action})
    assert text.count("qk_clip") == 1
    assert "{" not in text


def test_places_and_the_largest_change_are_named() -> None:
    record = {
        "intervention": "cap_query_key_norm",
        "action": "applied",
        "places": [[f"h.{layer}", None] for layer in (2, 10, 9)],
        "before": {"norm": {"h.2": 5.9, "h.9": 4.0}},
        "after": {"norm": {"h.2": 5.8, "h.9": 2.0}},
        "why": "logit_growth at h.2",
    }
    assert intervention_text(record) == (
        "applied cap_query_key_norm at h.2 … h.10 (3 layers): norm 4 -> 2 (largest of 2 changes); "
        "reason: logit_growth at h.2"
    )


def test_records_without_parts_and_of_odd_types_are_said() -> None:
    assert intervention_text({}) == "applied"
    odd = {"intervention": "stop", "before": 3, "after": None, "why": 4, "places": "run"}
    assert intervention_text(odd) == "applied stop"
    assert places_of({"layer": "h.0", "head": 3}) == [("h.0", 3)]


def test_what_is_taken_back_has_no_change_and_notes_are_short() -> None:
    record = {
        "intervention": "cap_learning_rate",
        "before": {"lr": 0.03},
        "after": {"lr": 0.01},
        "note": "layer by layer " * 30,
    }
    assert "lr 0.03 -> 0.01" in intervention_text({**record, "action": "applied"})
    undone = intervention_text({**record, "action": "undone", "note": ""})
    assert undone == "took cap_learning_rate back"
    assert len(intervention_text({**record, "action": "applied"})) < 240
