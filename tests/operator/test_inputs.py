"""What an operator does to the world around it, and what it says of inputs that cannot be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from stabmon.operator import STATISTICS, attention_operator, operator_of_scores
from tests.support.operator_cases import CASES, ENGINES, plain

QUERY, KEY = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 6, 8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"query": QUERY[0]}, r"query \(4, 5, 8\).*give \[B, H, Q, D\]"),
        ({"query": QUERY.long()}, r"torch.int64.*floating-point"),
        ({"key": KEY[:1]}, r"\(1, 2, 6, 8\) differ in batch or head dimension"),
        ({"key": torch.zeros(2, 2, 6, 7)}, r"\(2, 2, 6, 7\) differ in batch or head dimension"),
        ({"key": KEY[:, :, :0]}, r"\(2, 2, 0, 8\): nothing to attend"),
        ({"key": torch.zeros(2, 3, 6, 8)}, "4 query heads over 3 key heads"),
        ({"key": KEY.to("meta")}, "query is on cpu and key on meta"),
        ({"scale": 0.0}, r"scale 0.0: give a finite number other than 0"),
        ({"scale": math.nan}, "scale nan"),
        ({"scale": math.inf}, "scale inf"),
        ({"window": 0}, "window 0: give at least 1"),
        ({"softcap": -1.0}, "softcap -1.0: give a positive number"),
        ({"softcap": math.nan}, "softcap nan: give a positive number"),
        ({"sinks": torch.zeros(3)}, r"sinks of shape \(3,\): give one logit a query head, \[4\]"),
        ({"mask": torch.zeros(5, 6, dtype=torch.long)}, r"mask is torch.int64: give bool"),
        (
            {"mask": torch.ones(5, 7, dtype=torch.bool)},
            r"mask of shape \(5, 7\) does not broadcast to .*\[2, 4, 5, 6\]",
        ),
        ({"mask": torch.ones(3, 1, 5, 6, dtype=torch.bool)}, r"\(3, 1, 5, 6\) does not broadcast"),
        (
            {"mask": torch.ones(1, 2, 4, 5, 6, dtype=torch.bool)},
            r"\(1, 2, 4, 5, 6\) does not broadcast",
        ),
        ({"engine": "flash"}, "unknown engine 'flash'. Known: auto, dense, blockwise, fused"),
    ],
)
def test_an_input_that_cannot_be_is_named_with_its_mend_in_one_line(
    change: dict[str, Any], said: str
) -> None:
    inputs = {"query": QUERY, "key": KEY, "scale": 0.3} | change
    with pytest.raises(ValueError, match=said) as error:
        attention_operator(inputs.pop("query"), inputs.pop("key"), **inputs)
    assert "\n" not in str(error.value)


def test_scores_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match=r"scores of shape \(3, 4\)"):
        operator_of_scores(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"torch.int64"):
        operator_of_scores(torch.zeros(1, 1, 3, 4, dtype=torch.long))


@pytest.mark.parametrize("engine", ENGINES)
def test_questions_that_no_operator_answers_are_named(engine: str) -> None:
    operator = plain().operator(engine)
    with pytest.raises(ValueError, match=r"power 4 of the log-partition: use 1, 2 or 3"):
        operator.log_partition(4)
    with pytest.raises(
        ValueError, match=r"unknown statistic 'entropie'. Known: collision, entropy"
    ):
        operator.prepare(["entropie"])


@pytest.mark.parametrize("engine", ENGINES)
def test_global_random_generators_are_left_alone(engine: str) -> None:
    from stabmon.operator.kernels import prove

    prove.cache_clear()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    operator = CASES["causal"].operator(engine)
    operator.prepare(STATISTICS)
    operator.matvec(torch.ones(1, 1, 37, 1))
    operator.rmatvec(torch.ones(1, 1, 37, 1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("engine", ENGINES)
def test_inputs_stay_as_they_are_and_get_no_graph(engine: str) -> None:
    case = CASES["pairwise bias with holes"]
    query, key = case.query.clone().requires_grad_(), case.key.clone().requires_grad_()
    mask = case.options["mask"].clone()
    operator = attention_operator(query, key, scale=case.scale, mask=mask, engine=engine)
    results = [operator._get(name) for name in STATISTICS] + [
        operator.matvec(torch.ones(1, 1, 37, 1, requires_grad=True))
    ]
    assert not any(result.requires_grad for result in results)
    assert torch.equal(query, case.query)
    assert torch.equal(key, case.key)
    assert torch.equal(mask, case.options["mask"])


@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_does_not_reach_the_statistics(engine: str) -> None:
    case = plain(is_causal=True)
    expected = case.operator(engine).entropy()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        operator = case.operator(engine)
        assert torch.equal(operator.entropy(), expected)
        product = operator.matvec(torch.ones(1, 1, 37, 1))
    assert product.dtype == expected.dtype
    torch.testing.assert_close(product, torch.ones_like(product), rtol=0, atol=1e-6)


def test_a_mask_that_changed_in_place_is_looked_at_again() -> None:
    """A summary of each mask is remembered for the other layers of the same forward."""
    mask = torch.ones(1, 1, 37, 37, dtype=torch.bool)
    assert plain(mask=mask).operator("blockwise").n_visible().unique().tolist() == [37]
    mask[..., 20:] = False
    assert plain(mask=mask).operator("blockwise").n_visible().unique().tolist() == [20]


def test_auto_takes_the_blockwise_engine_on_a_cpu() -> None:
    assert plain().operator("auto").engine == "blockwise"
