"""The work of ``stabmon check``: from its options to a printed report."""

from __future__ import annotations

from collections.abc import Callable
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
from stabmon.check.loading.source import LoadedModel, load_target
from stabmon.check.measuring.short_run import ShortRun
from stabmon.check.region.region import OperatingPoint
from stabmon.check.region.view import region_plot
from stabmon.check.report.report import StabilityReport
from stabmon.check.sweep.proxy import Proxy, make_proxy
from stabmon.check.sweep.sweep import sweep_rates
from stabmon.cli.checking.options import CheckOptions
from stabmon.cli.errors import one_line_errors
from stabmon.cli.outputs import prove_file
from stabmon.cli.progress import working
from stabmon.figures.canvas import drawable
from stabmon.tiny.recipe import Recipe

MEND = "give a --seq-len that it takes, or use stabmon.check_attention_stability(model, sample)"


def checked(options: CheckOptions) -> StabilityReport:
    """Check a model.

    Args:
        options: of the command.

    Returns:
        The report, with a sweep over learning rates if asked for.

    Raises:
        ValueError: for options or input that are wrong, in one line.
    """
    _check_options(options)
    attention = None if options.attn is None else ATTENTION[options.attn]
    given = {
        "dtype": options.dtype,
        "seq_len": options.seq_len,
        "seed": options.seed,
        "region": options.region or options.plot is not None,
    }
    settings = check_config(given, "--")
    recipe = Recipe.parse(options.schedule)
    with working(f"loading {options.model}") as say:
        target = load_target(options.model, attention, options.seed)
        proxy = None
        if options.sweep:
            length = trained_length(target, options.seq_len)
            proxy = make_proxy(target, attention, options.text, length)
        report = _measured(target, options, settings, say)
        if options.plot is not None and report.views:
            say(f"drawing {options.plot}")
            _draw(report, options.plot)
        if proxy is not None and report.views:
            return _swept(report, proxy, recipe, options, say)
    if options.lr is not None:
        note = f"the rate {options.lr:g} is not judged by a forward alone: add --sweep"
        return replace(report, notes=(*report.notes, note))
    return report


def print_report(report: StabilityReport, options: CheckOptions) -> None:
    """Print a report in words or as JSON, and write it to ``--markdown``."""
    if options.markdown is not None:
        Path(options.markdown).write_text(report.to_markdown(), encoding="utf-8")
    if options.as_json:
        print(dumps(report.to_dict()))
    else:
        from stabmon.check.report.terminal import show

        show(report, Console(highlight=False))


def _measured(
    target: LoadedModel, options: CheckOptions, settings: CheckConfig, say: Callable[[str], None]
) -> StabilityReport:
    """Run the model on a sample and judge it."""
    length = trained_length(target, options.seq_len)
    tokens = sample_length(target, length, options.batch)
    sample, notes = make_sample(target, tokens, options.batch, options.text, options.seed)
    reads_tokens = getattr(target.model, "main_input_name", "input_ids") == "input_ids"
    if target.sample is None and reads_tokens:
        settings = replace(settings, seq_len=length)
        if tokens < length:
            notes.append(
                f"the sample has {tokens} tokens; for {length} its scores were carried over"
            )
    failed = f"{options.model}: the model failed on a sample of {tokens} tokens"
    say(f"a forward and a backward of {target.subject} on {tokens} tokens")
    with one_line_errors(failed, MEND):
        report = check_attention_stability(
            target.model, sample, settings, subject=target.subject, analytic=target.analytic
        )
    if target.sample is None and reads_tokens:
        source = "random tokens" if options.text is None else f"tokens of {options.text}"
        report = replace(report, sample=f"{options.batch} × {tokens} {source}")
    return replace(report, notes=(*target.notes, *notes, *report.notes))


def _swept(
    report: StabilityReport,
    proxy: Proxy,
    recipe: Recipe,
    options: CheckOptions,
    say: Callable[[str], None],
) -> StabilityReport:
    """Add a sweep over learning rates to a report."""
    say("training a few dozen steps at several rates")

    def show(run: ShortRun) -> None:
        say(
            f"training at several rates; {run.rate:.3g} gave a largest score of "
            f"{run.scores[-1].max():.3g} and a loss of {run.losses[-1]:.3f}"
        )

    with one_line_errors(f"--sweep: training on {proxy.length} tokens a row failed", MEND):
        found = sweep_rates(
            proxy.make,
            proxy.batches,
            recipe,
            report.config.dtype,
            proxy.length,
            around=1e-3 if options.lr is None else options.lr * proxy.full_width / proxy.width,
            widths=(proxy.width, proxy.full_width),
            on_run=show,
        )
    judged = judge_rate(found, options.lr)
    return replace(
        report,
        findings=ranked([*report.findings, *([judged] if judged else [])]),
        notes=(*report.notes, proxy.note),
        extra={**report.extra, "sweep": found.to_dict()},
    )


def _draw(report: StabilityReport, path: str) -> None:
    region_plot(OperatingPoint.of(report.views), report.config, path)


@dataclass(frozen=True)
class _Judged:
    """The options that the check itself takes."""

    attn: Annotated[str, Known(ATTENTION, "implementation")] | None
    batch: Count
    lr: Annotated[float, Bounds(above=0, below=100)] | None


def _check_options(options: CheckOptions) -> None:
    """Raise a ValueError in one line for an option that is wrong, or a file without a place."""
    check_settings(_Judged(options.attn, options.batch, options.lr), "--")
    if options.markdown is not None:
        prove_file(options.markdown, "--markdown")
    if options.plot is not None:
        prove_file(options.plot, "--plot", drawable())
