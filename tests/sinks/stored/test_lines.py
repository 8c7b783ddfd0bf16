"""Facts of lines, against the same lines parsed whole."""

import json
import math

import numpy as np
import pytest

from stabmon._storage import strict_json
from stabmon.records import Reading
from stabmon.sinks.jsonl import READINGS
from stabmon.sinks.stored.lines import HEAD_BYTES, facts_of, head_of, layer_signals
from tests.support.written_records import opened

NAMES = ("h.0.attn", 'odd "quoted" \\ name', "käse.1", "layers", "run")


@pytest.fixture(params=[2.5, 1e-7, 12345678.0, None, math.nan, math.inf, -math.inf])
def line(request: pytest.FixtureRequest, tmp_path) -> bytes:
    """A stored line of five layers, heads that are not finite among them."""
    sink = opened(tmp_path)
    heads = {"max_logit": np.array([1.0, math.nan, 3.0]), "sink_mass": np.array([0.5, 0.25, 1.0])}
    sink.write_reading(Reading(70, request.param, dict.fromkeys(NAMES, heads)), {})
    sink.close()
    return (tmp_path / READINGS).read_bytes()


def test_facts_are_those_of_the_parsed_line(line: bytes) -> None:
    values, facts = strict_json.loads(line), facts_of(line)
    assert (facts.run, facts.start, facts.step) == (values["run"], values["start"], 70)
    assert repr(facts.loss) == repr(values["loss"])


def test_any_order_of_fields_is_read(line: bytes) -> None:
    other = json.dumps(dict(reversed(json.loads(line).items()))).encode() + b"\n"
    assert repr(facts_of(other)) == repr(facts_of(line))


def test_the_head_is_enough_for_a_finite_loss(line: bytes) -> None:
    loss = facts_of(line).loss
    finite = loss is not None and math.isfinite(loss)
    assert head_of(line[:HEAD_BYTES]) == ((70, loss) if finite else None)


@pytest.mark.parametrize("layer", NAMES)
def test_one_layer_is_read_alone(line: bytes, layer: str) -> None:
    found = layer_signals(line, layer)
    assert list(found) == ["max_logit", "sink_mass"]
    np.testing.assert_array_equal(found["max_logit"], [1.0, math.nan, 3.0])


def test_a_layer_that_is_not_there_has_no_signals(line: bytes) -> None:
    assert layer_signals(line, "h.9.attn") == {}


@pytest.mark.parametrize("cut", [5, 40, 200])
def test_an_unfinished_line_is_refused(line: bytes, cut: int) -> None:
    with pytest.raises(ValueError):
        facts_of(line[:-cut])


@pytest.mark.parametrize("text", [b"{}", b"[1]", b'{"schema_version": 9, "step": 1}', b"\xff"])
def test_what_is_no_reading_of_this_version_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):
        facts_of(text)


HUGE = "1" + 400 * "0"


def test_whole_numbers_that_float64_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 308 digits"):
        strict_json.loads(f'{{"after": [1, {HUGE}]}}')
    assert strict_json.loads(f'{{"seed": {2**64 - 1}}}') == {"seed": 2**64 - 1}
    with pytest.raises(ValueError, match="float64"):
        layer_signals(f'{{"layers": {{"a": {{"max_logit": [{HUGE}]}}}}}}'.encode(), "a")
    head = f'{{"schema_version": 1, "step": {HUGE}, "loss": 2.5, "layers": '
    assert head_of(head.encode()) is None
