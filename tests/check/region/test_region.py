"""The stability region: binding limits, the model's own position, the picture."""

import math
from pathlib import Path

import pytest

import stabmon
from stabmon.check.config import CheckConfig
from stabmon.check.region.region import (
    CAUSES,
    OperatingPoint,
    grid,
    grid_point,
    region_data,
    stability_region,
)
from stabmon.check.region.view import region_plot, region_table
from tests.support import check_models as models

GPT2 = OperatingPoint(spread=0.307, head_dim=64, seq_len=1024, scale=0.125, fused=False)
CONFIG = CheckConfig()


def at(
    temperature: float,
    dtype: str = "fp16",
    origin: OperatingPoint = GPT2,
    head_dim: int = 64,
    seq_len: int = 1024,
):  # type: ignore[no-untyped-def]
    return grid_point(origin, temperature, head_dim, seq_len, dtype, CONFIG)


def test_a_healthy_model_is_inside_in_every_format_and_hot_ones_are_not() -> None:
    assert all(at(1.0, dtype).stable for dtype in ("fp16", "bf16", "fp32"))
    hot = at(2.0**-5)
    assert not hot.stable
    assert hot.cause == "saturation"


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_margins_fall_as_scores_grow(dtype: str) -> None:
    margins = [at(2.0**-power, dtype) for power in range(8)]
    for cause in (0, 1):
        values = [each.margins[cause] for each in margins]
        assert values == sorted(values, reverse=True)
        assert values[0] - values[3] == pytest.approx(3.0)


def test_formats_differ_by_their_bits_in_precision_alone() -> None:
    half, brain, single = (at(1.0, dtype).margins for dtype in ("fp16", "bf16", "fp32"))
    assert half[0] == brain[0] == single[0]
    assert (half[1] - brain[1], single[1] - half[1]) == pytest.approx((3, 13))
    assert (half[2] - brain[2], single[2] - half[2]) == pytest.approx((3, 13))


def test_overflow_binds_on_the_path_that_writes_products_in_float16_alone() -> None:
    wide = OperatingPoint(spread=1.0, head_dim=64, seq_len=1024, scale=1e-4, fused=False)
    assert at(1.0, "fp16", wide).cause == "overflow"
    assert at(1.0, "bf16", wide).margins[3] == math.inf
    assert at(1.0, "fp16", OperatingPoint(1.0, 64, 1024, 1e-4, fused=True)).margins[3] == math.inf


def test_longer_rows_bear_wider_scores_before_they_saturate() -> None:
    margins = [at(1.0, seq_len=length).margins[0] for length in (128, 1024, 8192, 65_536)]
    assert margins == sorted(margins)


def test_the_grid_holds_the_models_own_place_and_reads_by_row() -> None:
    origin = OperatingPoint(0.3, 48, 1000, 48**-0.5, True)
    points = stability_region(
        origin, CONFIG, temperatures=(0.5, 1.0), head_dims=(16, 64), lengths=(128, 4096)
    )
    assert len(points) == 3 * 2 * 3 * 3
    rows = dict(grid(points, "bf16", "seq_len", 48))
    assert [p.seq_len for p in rows[1.0]] == [128, 1000, 4096]
    data = region_data(origin, points)
    assert len(data["rows"]) == len(points)
    assert set(dict(zip(data["columns"], data["rows"][0], strict=True))) >= {
        "stable",
        "cause",
        *(f"{c}_margin" for c in CAUSES),
    }


def test_a_check_gives_the_region_as_data_a_table_and_a_picture(tmp_path: Path) -> None:
    report = stabmon.check_attention_stability(models.gpt2(), models.tokens(), {"region": True})
    assert report["region"]["model"]["head_dim"] == 32
    origin = OperatingPoint.of(report.views)
    table = region_table(origin, stability_region(origin, CONFIG), "bf16")
    assert table.row_count == 12
    figure = region_plot(origin, CONFIG, tmp_path / "region.png")
    assert (tmp_path / "region.png").stat().st_size > 10_000
    stars = [line for axes in figure.axes for line in axes.lines if line.get_marker() == "*"]
    assert len(stars) == 6
    assert {float(star.get_xdata()[0]) for star in stars} == {64.0, 32.0}
