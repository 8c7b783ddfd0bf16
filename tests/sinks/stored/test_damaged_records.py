"""Reader, watch and page survive damaged records, and name them."""

import pytest

from stabmon.sinks.stored.lines import audit_of, marks_of
from tests.bench.damaged_records import damage_files, show, sound_files, try_records


def test_sound_records_are_shown_whole(tmp_path):
    for name, text in sound_files().items():
        (tmp_path / name).write_text(text)
    page = show(tmp_path)
    assert "records that could not be written: 3 readings of steps 12 to 18" in page


def test_nothing_is_raised_for_any_damage():
    wrong = [(number, repr(error)) for number, _, error in try_records(40, seed=7) if error]
    assert wrong == []


def test_damage_is_what_it_says():
    import random

    files = sound_files()
    broken = [damage_files(files, random.Random(seed)) for seed in range(20)]
    changed = sum(any(b[n] != files[n].encode() for n in files) for b in broken)
    assert changed >= 18


@pytest.mark.parametrize("values", [{"run": 10**9}, {"start": -1}, {"run": 1.5}, {"start": "1"}])
def test_marks_that_no_start_has_are_refused(values):
    with pytest.raises(ValueError, match=r"start|run"):
        marks_of(values)


@pytest.mark.parametrize(
    "values",
    [{"step": "soon"}, {"intervention": ["x"]}, {"places": [[["a"], 1]]}, {"head": "first"}],
)
def test_an_audit_record_of_other_types_is_refused(values):
    with pytest.raises(ValueError, match="is"):
        audit_of(values)
