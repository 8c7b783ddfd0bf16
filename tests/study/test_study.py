"""``stabmon train``: what it compares, leaves, resumes and refuses."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from stabmon.sinks.reader import read_records
from stabmon.study.fit import Phase, fit, split
from stabmon.study.plan import StudySettings, Task, tasks
from stabmon.study.report import markdown, summary
from stabmon.study.settings import SettingsError, WatchSettings, read_settings
from stabmon.study.side_by_side import run_tasks
from stabmon.study.study import prepare, run_study
from stabmon.study.task import run_task
from stabmon.study.variants import VARIANTS, apply_variant
from stabmon.tiny.corpus import load_corpus
from stabmon.tiny.language_models import Shape, make_model
from stabmon.tiny.statistics import mean_and_interval, student_t
from tests.support.interruptible import interruptible

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "controllers").glob("*.yaml"))
TINY = [
    *(
        "model.layers=2",
        "model.heads=2",
        "model.width=16",
        "corpus.block=16",
        "seeds=[0, 1]",
        "workers=0",
        "watch_every=2",
    ),
    *("base.steps=6", "base.batch=4", "base.validate_every=3", "base.warmup=2"),
    *(
        "controllers.steps=4",
        "controllers.batch=4",
        "controllers.validate_every=2",
        "controllers.warmup=1",
    ),
]


@pytest.fixture
def settings(tmp_path: Path) -> StudySettings:
    """A study of seconds."""
    text = tmp_path / "text.txt"
    text.write_bytes(b"attention is all you need, or is it? " * 60)
    more = [
        f"run_dir={tmp_path / 'run'}",
        f"corpus.text={text}",
        "frozen=[both, linear_ramp, matched_control]",
        "joint=[key_bias]",
    ]
    return read_settings(StudySettings, CONFIGS[0], [*TINY, *more])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_can_be_read_and_names_known_variants(path: Path) -> None:
    found = read_settings(StudySettings, path)
    assert {*found.frozen, *found.joint} <= set(VARIANTS)
    assert len(found.seeds) >= 3 or found.stabmon is not None
    assert len(tasks(found)) == len(found.seeds) * (1 + len(found.frozen) + len(found.joint))


def test_a_study_leaves_a_table_series_and_pictures_and_goes_on_where_it_was(
    settings: StudySettings,
) -> None:
    folder = prepare(settings)
    for task in tasks(settings):
        run_task(settings, task)
    found = summary(settings, folder)
    assert [row["variant"] for row in found["frozen"]] == [
        "base",
        "both",
        "linear_ramp",
        "matched_control",
    ]
    assert [row["variant"] for row in found["joint"]] == ["base", "key_bias"]
    base = found["frozen"][0]["losses"]
    for row in found["frozen"]:
        assert row["minus_base"] == pytest.approx(
            sum(a - b for a, b in zip(row["losses"], base, strict=True)) / 2
        )
    assert found["frozen"][2]["parameters"] == 0
    assert "| both |" in markdown(found, 2)
    assert (folder / "series" / "frozen-both-0" / "stabmon" / "readings.jsonl").read_text().count(
        "\n"
    ) == 2
    assert not (folder / "series" / "frozen-both-1").exists()

    kept = folder / "results" / "frozen-both-0.json"
    stamp = kept.stat().st_mtime_ns
    with pytest.raises(SettingsError, match="resume=true"):
        run_study(settings)
    resumed = read_settings_again(settings, resume=True)
    run_study(resumed)
    assert kept.stat().st_mtime_ns == stamp
    assert {"grid.png", "series.png", "text.txt"} <= {
        path.name for path in (folder / "generate").iterdir()
    }
    with pytest.raises(SettingsError, match="other settings"):
        run_study(read_settings_again(resumed, gain_max=3.0))


def read_settings_again(settings: StudySettings, **changes: Any) -> StudySettings:
    return dataclasses.replace(settings, **changes)


def test_a_task_is_the_same_whenever_it_is_run(settings: StudySettings) -> None:
    prepare(settings)
    first = [
        run_task(settings, Task("joint", name, 1))["held_out"] for name in ("base", "key_bias")
    ]
    again = [
        run_task(settings, Task("joint", name, 1))["held_out"] for name in ("base", "key_bias")
    ]
    assert first == again


@pytest.mark.long
def test_a_model_trained_under_watch_is_the_same_and_leaves_records(
    settings: StudySettings,
) -> None:
    prepare(settings)
    task = Task("joint", "key_bias", 0)
    unwatched = run_task(settings, task)["held_out"]
    watched = dataclasses.replace(settings, stabmon=WatchSettings("observe", log_every=2))
    assert run_task(watched, task)["held_out"] == unwatched
    records = read_records(Path(settings.run_dir) / "watched" / task.name)
    assert [reading.step for reading in records.readings] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(SettingsError, match="stabmon: "):
        prepare(dataclasses.replace(settings, stabmon=WatchSettings("nonesuch")))


def test_a_frozen_base_is_frozen_and_the_best_parameters_are_kept(settings: StudySettings) -> None:
    corpus = load_corpus(settings.corpus.text, block=16)
    torch.manual_seed(0)
    model = make_model(Shape(layers=2, heads=2, width=16), 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    added = apply_variant(model, "both", {"bias_max": 1.0, "gain_max": 4.0})
    fitted = fit(
        model,
        added,
        corpus,
        Phase(steps=8, batch=4, learning_rate=0.5, validate_every=1, warmup=1, patience=2),
        0,
    )
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in before)
    assert fitted.parameters == sum(each.numel() for each in added)
    assert fitted.best_step <= fitted.steps <= 8
    assert not fitted.best_step or fitted.validation < float("inf")


def test_what_chooses_and_what_is_reported_are_apart() -> None:
    corpus = load_corpus(block=64)
    validation, held_out = split(corpus)
    rows = [{tuple(row) for row in part.tolist()} for part in (validation, held_out)]
    assert len(validation) + len(held_out) == len(corpus.validation)
    assert not rows[0] & rows[1]


@pytest.mark.parametrize("heads", [4])
def test_a_matched_control_starts_as_the_identity_and_has_about_as_many_parameters(
    heads: int,
) -> None:
    counts = {}
    for name in ("key_bias", "query_gain", "matched_control", "both", "matched_control_of_both"):
        torch.manual_seed(0)
        model = make_model(Shape(layers=2, heads=heads, width=64), 16).eval()
        tokens = torch.arange(32).view(2, 16)
        with torch.no_grad():
            before = model(input_ids=tokens).logits
            counts[name] = sum(each.numel() for each in apply_variant(model, name, {}))
            torch.testing.assert_close(model(input_ids=tokens).logits, before, atol=1e-5, rtol=1e-5)
    assert (
        counts["key_bias"]
        == counts["query_gain"]
        == pytest.approx(counts["matched_control"], rel=0.02)
    )
    assert counts["both"] == pytest.approx(counts["matched_control_of_both"], rel=0.02)


def test_intervals_are_those_of_students_t() -> None:
    from scipy import stats

    values = [1.61, 1.68, 1.55, 1.70]
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    mean, half = mean_and_interval(values)
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-9)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
def test_quantiles_of_students_t_are_scipys(confidence: float) -> None:
    from scipy import stats

    for freedom in (1, 2, 3, 4, 5, 8, 30, 101):
        expected = stats.t.ppf((1 + confidence) / 2, freedom)
        assert student_t(confidence, freedom) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (["nonesuch.yaml"], 2, "nonesuch.yaml: No such file or directory"),
        ([str(CONFIGS[0]), "base.stpes=3"], 2, "did you mean 'steps'"),
        (
            [str(CONFIGS[0]), "frozen=[key_bais]"],
            2,
            "command line: frozen.*unknown variant 'key_bais', did you mean 'key_bias'",
        ),
        ([str(CONFIGS[0]), "--text", "nonesuch.txt"], 2, "cannot read the text"),
        ([str(CONFIGS[0]), "model.heads=3"], 2, "model: width 64 must be a multiple of twice the"),
        ([str(CONFIGS[0]), "model.kv_heads=3"], 2, "model: kv_heads 3 must divide the 4 heads"),
    ],
)
def test_a_wrong_call_is_one_line_and_status_two(
    arguments: list[str], status: int, word: str, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from stabmon import cli

    with pytest.raises((ValueError, OSError), match=word):
        CliRunner().invoke(
            cli.app,
            ["train", *arguments, f"run_dir={tmp_path / 'run'}"],
            catch_exceptions=False,
            standalone_mode=False,
        )


@pytest.mark.long
def test_the_command_prints_one_json_object(
    settings: StudySettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from stabmon import cli

    given = [
        f"corpus.text={settings.corpus.text}",
        f"run_dir={tmp_path / 'cli'}",
        "seeds=[0]",
        "frozen=[query_gain]",
        "joint=[]",
    ]
    monkeypatch.setattr(sys, "argv", ["stabmon", "train", str(CONFIGS[0]), *TINY, *given, "--json"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    out, err = capsys.readouterr()
    rows = json.loads(out, parse_constant=pytest.fail)["tables"]["frozen"]
    assert [row["variant"] for row in rows] == ["base", "query_gain"]
    assert {row["held_out_half_interval"] for row in rows} == {None}
    assert "±" not in (tmp_path / "cli" / "table.md").read_text()
    first, second, *_, last = err.splitlines()
    assert first == f"2 trainings, 1 at a time, into {tmp_path / 'cli'}"
    assert re.fullmatch(r"\[0/2, \d+ s\] joint-base-0: step 1 of 6, loss \d\.\d{4}", second)
    assert re.fullmatch(r"\[2/2, \d+ s\] frozen-query_gain-0: held-out loss \d\.\d{4}", last)


def test_a_folder_that_cannot_be_written_is_refused_before_the_text_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stabmon import cli

    given = ["run_dir=/proc/run", "corpus.text=nonesuch.txt"]
    monkeypatch.setattr(sys, "argv", ["stabmon", "train", str(CONFIGS[0]), *given])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("stabmon: run_dir /proc/run: cannot be written")


@pytest.mark.long
def test_an_interruption_ends_all_processes_and_keeps_what_is_done(
    settings: StudySettings, tmp_path: Path
) -> None:
    """By the signal of Ctrl-C to the command alone, while two processes train."""
    given = [
        *(f"corpus.text={settings.corpus.text}", f"run_dir={tmp_path / 'run'}", "workers=2"),
        *("seeds=[0, 1, 2]", "frozen=[]", "joint=[both]", "base.steps=100000"),
        "base.validate_every=null",
    ]
    prepare(read_settings(StudySettings, CONFIGS[0], [*TINY, *given]))
    done = tmp_path / "run" / "results" / "joint-base-0.json"
    done.write_text(json.dumps({"kind": "joint", "variant": "base", "seed": 0}))
    command = [sys.executable, "-m", "stabmon.cli", "train", str(CONFIGS[0])]
    with interruptible(
        [*command, *TINY, *given, "resume=true"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = [next(process.stderr), next(process.stderr)]
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        said += process.stderr
        assert process.wait(timeout=20) == 130
    assert psutil.wait_procs(started, timeout=10)[1] == []
    assert said[0].startswith("5 trainings, 1 of 6 done before, 2 at a time, into ")
    assert ": step 1 of 100000, loss " in said[1]
    assert said[-2].startswith("1 of 6 trainings are done and kept in ")
    assert said[-2].endswith(": go on with resume=true\n")
    assert said[-1] == "stabmon: interrupted\n"
    assert done.exists()


def test_tasks_run_side_by_side_and_those_on_a_frozen_base_wait_for_it(
    settings: StudySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_processes(workers: int, **options: Any) -> Any:
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr("stabmon.study.side_by_side.ProcessPoolExecutor", without_processes)
    order: list[str] = []
    monkeypatch.setattr(
        "stabmon.study.side_by_side.run_task",
        lambda settings, task, say: order.append(task.name) or {"held_out": 1.0},
    )
    side_by_side = dataclasses.replace(settings, workers=2)
    found = [task for task, _ in run_tasks(side_by_side, tasks(settings))]
    assert (
        sorted(task.name for task in found)
        == sorted(task.name for task in tasks(settings))
        == sorted(order)
    )
    for name in order:
        kind, _, seed = name.split("-")
        assert kind == "joint" or order.index(f"joint-base-{seed}") < order.index(name)
