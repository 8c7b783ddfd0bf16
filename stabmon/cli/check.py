"""The body of ``stabmon check``: from the command's options to a report that is printed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from rich.console import Console

from stabmon._settings import Bounds, Count, Known
from stabmon._settings import check as check_settings
from stabmon._storage.strict_json import dumps
from stabmon.check.api import check_attention_stability
from stabmon.check.config import ATTENTION, CheckConfig, check_config
from stabmon.check.judging.findings import ranked
from stabmon.check.judging.judge_rate import judge_rate
from stabmon.check.loading.inputs import make_sample, sample_length, trained_length
from stabmon.check.loading.pretrained import quiet
from stabmon.check.loading.source import LoadedModel, load_target
from stabmon.check.measuring.short_run import ShortRun
from stabmon.check.region.region import OperatingPoint
from stabmon.check.region.view import region_plot
from stabmon.check.report.report import StabilityReport
from stabmon.check.sweep.proxy import Proxy, make_proxy
from stabmon.check.sweep.sweep import sweep_rates
from stabmon.tiny.recipe import Recipe


@dataclass(frozen=True)
class CheckOptions:
    """The command's options."""

    model: str
    seq_len: int | None = None
    dtype: str = "fp32"
    attn: Annotated[str, Known(ATTENTION, "implementation")] | None = None
    text: str | None = None
    batch: Count = 1
    seed: int = 0
    lr: Annotated[float, Bounds(above=0, below=100)] | None = None
    schedule: str = "constant"
    sweep: bool = False
    region: bool = False
    plot: str | None = None
    as_json: bool = False
    markdown: str | None = None
    fail_on: str = "error"

    def __post_init__(self) -> None:
        check_settings(self, "--")


def run(asked: CheckOptions) -> int:
    """Check, print, and give the exit status: 0 or 1.

    Raises:
        ValueError: for options or input that are wrong, in one line.
    """
    report = check(asked)
    if asked.markdown is not None:
        try:
            Path(asked.markdown).write_text(report.to_markdown())
        except OSError as error:
            raise ValueError(
                f"--markdown {asked.markdown}: {error.strerror or error}; name a file that can be "
                "written"
            ) from None
    if asked.as_json:
        print(dumps(report.to_dict()))
    else:
        from stabmon.check.report.terminal import view

        Console().print(view(report))
    return int(report.finds(asked.fail_on))


def check(asked: CheckOptions) -> StabilityReport:
    """The report on what was asked for."""
    attention = None if asked.attn is None else ATTENTION[asked.attn]
    settings = check_config(
        {
            "dtype": asked.dtype,
            "seq_len": asked.seq_len,
            "seed": asked.seed,
            "region": asked.region or asked.plot is not None,
        },
        "--",
    )
    recipe = Recipe.parse(asked.schedule)
    target = load_target(asked.model, attention, asked.seed)
    proxy = (
        make_proxy(target, attention, asked.text, trained_length(target, asked.seq_len))
        if asked.sweep
        else None
    )
    report = _checked(target, asked, settings)
    if asked.plot is not None and report.views:
        _draw(report, asked.plot)
    if proxy is not None and report.views:
        return _swept(report, proxy, recipe, asked)
    if asked.lr is not None:
        return replace(
            report,
            notes=(
                *report.notes,
                f"the rate {asked.lr:g} is not judged by a forward alone: add --sweep",
            ),
        )
    return report


def _swept(
    report: StabilityReport, proxy: Proxy, recipe: Recipe, asked: CheckOptions
) -> StabilityReport:
    """The report with a sweep over learning rates."""

    def told(run: ShortRun) -> None:
        if sys.stderr.isatty():
            print(
                f"rate {run.rate:.3g}: largest score {run.scores[-1].max():.3g}, loss "
                f"{run.losses[-1]:.3f}",
                file=sys.stderr,
            )

    with one_line_errors(f"--sweep: training on {proxy.length} tokens a row failed"):
        found = sweep_rates(
            proxy.make,
            proxy.batches,
            recipe,
            asked.dtype,
            proxy.length,
            around=1e-3 if asked.lr is None else asked.lr * proxy.full_width / proxy.width,
            widths=(proxy.width, proxy.full_width),
            told=told,
        )
    judged = judge_rate(found, asked.lr)
    return replace(
        report,
        findings=ranked([*report.findings, *([judged] if judged else [])]),
        notes=(*report.notes, proxy.note),
        extra={**report.extra, "sweep": found.to_dict()},
    )


@contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """What a model raises becomes a ValueError of one line; transformers keeps quiet meanwhile."""
    try:
        with quiet():
            yield
    except ValueError:
        raise
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{what} ({type(error).__name__}: {reason}); give a --seq-len that it takes, or use "
            "stabmon.check_attention_stability(model, sample)"
        ) from None


def _draw(report: StabilityReport, path: str) -> None:
    try:
        region_plot(OperatingPoint.of(report.views), report.config, path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--plot {path}: {error}; name a file that can be written, such as region.png"
        ) from None


def _checked(target: LoadedModel, asked: CheckOptions, settings: CheckConfig) -> StabilityReport:
    length = trained_length(target, asked.seq_len)
    tokens = sample_length(target, length, asked.batch)
    sample, notes = make_sample(target, tokens, asked.batch, asked.text, asked.seed)
    if (
        target.sample is None
        and getattr(target.model, "main_input_name", "input_ids") == "input_ids"
    ):
        settings = replace(settings, seq_len=length)
        if tokens < length:
            notes.append(
                f"the sample has {tokens} tokens; for {length} its scores were carried over"
            )
    with one_line_errors(f"{asked.model}: the model failed on a sample of {tokens} tokens"):
        report = check_attention_stability(
            target.model, sample, settings, subject=target.subject, analytic=target.analytic
        )
    return replace(report, notes=(*target.notes, *notes, *report.notes))
