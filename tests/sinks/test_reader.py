"""``stabmon.read_records``: tables, incidents, and how records print."""

import sys
from pathlib import Path

import numpy as np
import pandas
import pytest

import stabmon
from stabmon.incidents import incidents_of
from stabmon.records import Reading
from stabmon.sinks.reader import Records, read_records
from tests.support.written_records import collapse, opened, store, wide_reading


@pytest.fixture
def records(tmp_path: Path) -> Records:
    """Two runs: issues and an intervention in the second, which has a reading without layers."""
    store(tmp_path, (10,), layers=2, heads=3).close()
    sink = opened(tmp_path)
    sink.write_reading(wide_reading(10, layers=2, heads=3), {})
    sink.write_reading(Reading(15, None, {}), {})
    uneven = {"a": {"max_logit": np.array([1.0, np.nan])}, "b": {"sink_mass": np.array([0.5])}}
    sink.write_reading(Reading(20, 2.0, uneven), {})
    sink.write_issue(collapse(20))
    sink.write_issue(collapse(20, head=None))
    sink.write_intervention({"intervention": "stop", "action": "applied", "step": 20})
    sink.close()
    return stabmon.read_records(tmp_path)


def test_the_public_name_is_the_reader() -> None:
    assert stabmon.read_records is read_records


def test_readings_are_one_row_a_head(records: Records) -> None:
    table = records.to_pandas()
    names = ["normalized_entropy", "max_logit", "sink_mass"]
    assert list(table) == ["run", "step", "loss", "learning_rate", "layer", "head", *names]
    assert table.groupby(["run", "step"]).size().to_dict() == {
        (1, 10): 6,
        (2, 10): 6,
        (2, 15): 1,
        (2, 20): 3,
    }
    number = 0
    for run in records.runs:
        for reading in run.readings:
            rows = table[(table.run == run.number) & (table.step == reading.step)]
            assert ((rows.loss == reading.loss) | rows.loss.isna()).all()
            for layer, signals in reading.layers.items():
                own = rows[rows["layer"] == layer]
                for signal, values in signals.items():
                    assert own["head"].tolist() == list(range(len(values)))
                    np.testing.assert_array_equal(own[signal], values)
                    number += len(values)
    assert number == table[names].size - table[names].isna().sum().sum() + 1  # one value is NaN
    empty = table[table.step == 15].iloc[0]
    assert pandas.isna(empty["layer"])
    assert pandas.isna(empty["head"])
    assert pandas.isna(empty.loss)


def test_issues_interventions_and_incidents_are_one_row_each(records: Records) -> None:
    issues = records.to_pandas("issues")
    assert issues.run.tolist() == [2, 2]
    assert issues["head"].isna().tolist() == [False, True]
    assert issues.eta_steps.tolist() == [230.0, 230.0]
    done = records.to_pandas("interventions")
    assert done[["run", "step", "intervention"]].values.tolist() == [[2, 20, "stop"]]
    incidents = records.to_pandas("incidents")
    assert incidents.title.tolist() == [each.title for each in records.incidents]


@pytest.mark.parametrize("what", ["readings", "issues", "interventions", "incidents"])
def test_no_records_are_an_empty_table_with_its_columns(tmp_path: Path, what: str) -> None:
    opened(tmp_path).close()
    table = read_records(tmp_path).to_pandas(what)
    assert len(table) == 0
    assert "run" in table


def test_a_wrong_table_and_missing_pandas_name_the_mend(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"to_pandas\('losses'\): use one of 'readings', 'issues'"):
        records.to_pandas("losses")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r'pip install "stabmon\[pandas\]"'):
        records.to_pandas()


def test_incidents_are_those_of_each_run(records: Records) -> None:
    assert records.incidents == tuple(incidents_of(records.runs[1].issues))
    assert [run.number for run in records.runs] == [1, 2]
    assert records.runs[0].incidents == ()


def test_records_print_in_one_line_and_as_html(records: Records) -> None:
    text = repr(records)
    assert text.startswith(
        f"Records({records.folder}: 2 runs, 4 readings, steps 10 to 20, 2 issues"
    )
    assert "\n" not in text
    html = records._repr_html_()
    assert records.incidents[0].title in html
    assert len(html) < 5000
