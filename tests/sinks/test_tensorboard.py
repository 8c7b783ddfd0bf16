"""TensorBoard event files, read back by TensorBoard's own reader."""

from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from stabmon.incidents import IncidentLog
from stabmon.sinks import SINKS, SinkGroup
from stabmon.sinks.scalars import dashboard_scalars
from stabmon.sinks.tensorboard import TensorboardSink
from tests.support.sample_records import LAYERS, META, issue, reading


def read(folder: Path):  # type: ignore[no-untyped-def]
    """All events of a folder."""
    sizes = dict.fromkeys(event_accumulator.DEFAULT_SIZE_GUIDANCE, 0)
    accumulator = event_accumulator.EventAccumulator(str(folder), size_guidance=sizes)
    return accumulator.Reload()


def run(sink: TensorboardSink, folder: Path | None, steps: range) -> None:
    sink.open(folder, META)
    for step in steps:
        sink.write_reading(reading(step), dashboard_scalars(reading(step), [], alarms=step))
    sink.close()
    sink.close()


def test_scalars_arrive_under_their_names_at_their_steps(tmp_path: Path) -> None:
    run(SINKS["tensorboard"](), tmp_path, range(10, 40, 10))  # type: ignore[arg-type]
    events = read(tmp_path / "tensorboard")
    expected = dashboard_scalars(reading(20), [], alarms=20)
    assert set(events.Tags()["scalars"]) == set(expected)
    for name, value in expected.items():
        points = events.Scalars(name)
        assert [point.step for point in points] == [10, 20, 30]
        assert points[1].value == pytest.approx(value, rel=1e-6)
    assert events.Tags()["images"] == ["attention_heatmap/every_head"]
    assert events.Tags()["histograms"] == []


def test_an_issue_is_a_text(tmp_path: Path) -> None:
    sink = TensorboardSink()
    sink.open(tmp_path, META)
    sink.write_issue(issue(20, eta_steps=30.0))
    events = read(tmp_path / "tensorboard")  # before closing: an alarm is flushed at once
    found = events.Tensors("stability/issues/text_summary")
    sink.close()
    assert [event.step for event in found] == [20]
    text = found[0].tensor_proto.string_val[0].decode()
    for part in (
        "error",
        "entropy_collapse",
        LAYERS[1],
        "head 2",
        "0.034",
        "lower the learning rate",
        "30 steps",
    ):
        assert part in text


def test_every_issue_of_a_step_is_in_the_one_text_that_is_shown_of_it_errors_first(
    tmp_path: Path,
) -> None:
    group = SinkGroup([TensorboardSink()])
    group.open(tmp_path, META)
    shown = {}
    for step in (10, 20):
        ill = [
            issue(step, head=head, severity="error" if head == 17 else "warning")
            for head in range(30)
        ]
        group.write_issues(ill[:20])
        group.write_issues(ill[20:])
    group.write_issue(issue(30, issue_type="loss_spike", layer=None, head=None))
    group.close()
    for event in read(tmp_path / "tensorboard").Tensors("stability/issues/text_summary"):
        shown[event.step] = event.tensor_proto.string_val[
            0
        ].decode()  # the last of a step, as TensorBoard's page
    assert shown.keys() == {10, 20, 30}
    for step in (10, 20):
        lines = shown[step].split("\n\n")
        assert (
            sum(f"head {head}," in line for line in lines for head in range(30)) == len(lines) == 30
        )
        assert lines[0].startswith("**error**")
        assert "head 17," in lines[0]
    assert "loss_spike, run" in shown[30]


def test_heads_come_as_histogram_and_heatmap_on_request(tmp_path: Path) -> None:
    run(TensorboardSink(per_head=True, image_every=2), tmp_path, range(1, 6))
    events = read(tmp_path / "tensorboard")
    assert set(events.Tags()["images"]) == {
        "attention_heatmap/attention_entropy",
        "attention_heatmap/max_logit",
    }
    image = events.Images("attention_heatmap/max_logit")
    assert [point.step for point in image] == [1, 3, 5]
    assert image[0].width == 2 * image[0].height  # 2 layers of 4 heads
    histogram = events.Histograms("attention_heads/max_logit")
    assert [point.step for point in histogram] == [1, 2, 3, 4, 5]
    assert histogram[0].histogram_value.num == 8
    assert histogram[0].histogram_value.max == pytest.approx(13.01)


def test_heads_that_are_all_nan_bitwise_neutrality(tmp_path: Path) -> None:
    ill = reading(1, layers={"a": {"max_logit": np.array([np.nan, np.inf])}})
    group = SinkGroup([TensorboardSink(per_head=True)])
    group.open(tmp_path, META)
    group.write_reading(ill, {})
    group.write_reading(reading(2, layers={}), {})
    group.close()
    assert group.failed == {}
    assert len(read(tmp_path / "tensorboard").Images("attention_heatmap/max_logit")) == 1


def test_one_image_of_every_head_comes_untouched_at_an_alarm_and_at_the_end(tmp_path: Path) -> None:
    group = SinkGroup([TensorboardSink()])
    group.open(tmp_path, META)
    for step in (1, 2, 3, 4):
        group.write_reading(reading(step), {})
        if step == 2:
            group.write_incidents(IncidentLog().update([issue(step)]))
    group.close()
    images = read(tmp_path / "tensorboard").Images("attention_heatmap/every_head")
    assert [image.step for image in images] == [1, 2, 4]


def test_a_closed_writer_gets_what_is_left_and_is_closed_again(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path / "theirs"))
    sink = TensorboardSink(writer=writer)
    sink.open(tmp_path, META)
    for step in (1, 2):
        sink.write_reading(reading(step), {})
    writer.close()
    sink.close()
    assert writer.all_writers is None
    images = read(tmp_path / "theirs").Images("attention_heatmap/every_head")
    assert [image.step for image in images] == [1, 2]


def test_a_resume_from_an_earlier_step_hides_what_came_after_it(tmp_path: Path) -> None:
    run(TensorboardSink(), tmp_path, range(10, 60, 10))
    run(TensorboardSink(), tmp_path, range(30, 50, 10))
    points = read(tmp_path / "tensorboard").Scalars("stability/alarms")
    assert [point.step for point in points] == [10, 20, 30, 40]


def test_a_writer_that_was_passed_in_is_used_and_stays_open(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path / "theirs"))
    run(TensorboardSink(writer=writer), tmp_path, range(1, 2))
    writer.add_scalar("loss", 1.0, 1)
    writer.close()
    assert {"loss", "stability/alarms"} <= set(read(tmp_path / "theirs").Tags()["scalars"])
    assert not (tmp_path / "tensorboard").exists()


def test_without_a_folder_it_says_what_to_give() -> None:
    group = SinkGroup([TensorboardSink()])
    group.open(None, META)
    assert "give the monitor a run_dir, or the sink a writer" in group.failed["TensorboardSink"]
