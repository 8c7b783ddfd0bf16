"""A damaged state is refused by a ValueError, and changes nothing then."""

from tests.bench.damaged_records import try_states


def test_only_a_value_error_is_raised_and_nothing_has_changed():
    found = list(try_states(8, seed=7))
    assert [(number, kind, repr(error)) for number, kind, error in found if error] == []
    kinds = {kind for _, kind, _ in found}
    assert "refused" in kinds, "some damage is found"
