"""Maps packed into a page, unpacked again as the page's script does it."""

import base64
import gzip
from typing import Any

import numpy as np
import pytest

from stabmon.report.maps import packed_maps
from tests.support.analysis_records import causal


def unpacked(packed: dict[str, Any]) -> list[np.ndarray]:
    """The values that a reader of the page sees."""
    meta = packed["meta"]
    raw = gzip.decompress(base64.b64decode(packed["data"]))
    codes = np.frombuffer(raw, "<u2" if meta["bytes"] == 2 else "u1").astype(np.float64)
    values = codes / meta["levels"]
    values = values**2 if meta["root"] else values
    values[codes == meta["levels"] + 1] = np.nan
    found, at = [], 0
    for layer in meta["layers"]:
        shape = len(layer["heads"]), layer["rows"], layer["cols"]
        size = int(np.prod(shape))
        found.append(values[at : at + size].reshape(shape) * np.array(layer["tops"])[:, None, None])
        at += size
    assert at == len(codes)
    return found


def test_small_maps_are_exact_to_a_hundred_thousandth() -> None:
    maps = [causal(3, 20), causal(2, 15)[:, :, :]]
    maps[0][1, 4] = np.nan
    found = unpacked(packed_maps(maps, ["a", "b"]))
    for given, read in zip(maps, found, strict=True):
        assert np.array_equal(np.isnan(given), np.isnan(read))
        assert np.nanmax(np.abs(given - read)) < 1e-5


@pytest.mark.parametrize("budget", [60_000, 30_000, 9_000])
def test_the_finest_form_that_fits_is_taken_and_errs_as_it_says(budget: int) -> None:
    maps = [causal(4, 64, seed) for seed in range(3)]
    packed = packed_maps(maps, ["a", "b", "c"], budget=budget)
    meta = packed["meta"]
    assert len(packed["data"]) <= budget
    factor = meta["factor"]
    for given, read in zip(maps, unpacked(packed), strict=True):
        pooled = given.reshape(4, 64 // factor, factor, 64 // factor, factor).max((2, 4))
        top = pooled.max((1, 2), keepdims=True)
        bound = 1e-5 if meta["levels"] == 65534 else 1 / meta["levels"]
        assert (np.abs(pooled - read) <= bound * top + 1e-9).all()
    if factor > 1:
        assert f"{factor} × {factor} pairs" in packed["note"]
    assert (meta["levels"], factor) != (65534, 1)


def test_an_unaffordable_budget_ends_with_one_cell_a_map() -> None:
    packed = packed_maps([causal(2, 8)], ["a"], budget=1)
    assert packed["meta"]["layers"][0]["rows"] == 1


def test_the_same_maps_give_the_same_bytes_and_pooling_adds_up() -> None:
    maps = [causal(1, 8)]
    first, second = packed_maps(maps, ["a"], pooled=4), packed_maps(maps, ["a"], pooled=4)
    assert first["data"] == second["data"]
    assert first["meta"]["factor"] == 4
    with pytest.raises(ValueError, match="no maps"):
        packed_maps([], [])
