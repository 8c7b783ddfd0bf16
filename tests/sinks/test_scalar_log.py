"""Sinks that log scalars alone: the layers they show, and the marker of interventions."""

from stabmon.sinks.dashboards.scalar_log import ScalarLog
from tests.support.sample_records import issue, reading


class Kept(ScalarLog):
    """Keeps what it is to log."""

    def __init__(self, **options: bool) -> None:
        super().__init__(**options)
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self.rows.append((step, scalars))


SCALARS = {"stability/risk": 0.1} | {
    f"attention_layers/h.{number}/max_logit": float(number) for number in range(6)
}


def layers_of(row: tuple[int, dict[str, float]]) -> set[str]:
    return {name.split("/")[1] for name in row[1] if name.startswith("attention_layers/")}


def test_of_many_layers_those_that_issues_name_are_logged() -> None:
    sink, every = Kept(), Kept(every_layer=True)
    for each in (sink, every):
        each.write_reading(reading(1), SCALARS)
        each.write_issues([issue(1, layer="h.3")])
        each.write_reading(reading(2), SCALARS)
    assert [layers_of(row) for row in sink.rows] == [set(), {"h.3"}]
    assert [len(layers_of(row)) for row in every.rows] == [6, 6]
    assert [row["stability/risk"] for _, row in sink.rows] == [0.1, 0.1]


def test_the_layers_of_a_small_model_are_all_logged() -> None:
    sink = Kept()
    sink.write_reading(reading(1), dict(list(SCALARS.items())[:5]))
    assert layers_of(sink.rows[0]) == {"h.0", "h.1", "h.2", "h.3"}


def test_an_intervention_is_marked_at_its_step_and_one_that_was_refused_is_not() -> None:
    sink = Kept()
    sink.write_reading(reading(1), {"a": 1.0})
    sink.write_intervention({"action": "refused", "step": 1})
    sink.write_intervention({"action": "applied", "step": 1})
    sink.write_reading(reading(2), {"a": 2.0})
    assert sink.rows == [
        (1, {"a": 1.0}),
        (1, {"stability/intervention": 1.0}),
        (2, {"a": 2.0, "stability/intervention": 0.0}),
    ]
