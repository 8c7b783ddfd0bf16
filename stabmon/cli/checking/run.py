"""The work of ``stabmon check``: from its options to a printed report."""

from __future__ import annotations

import sys
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
    target = load_target(options.model, attention, options.seed)
    proxy = None
    if options.sweep:
        length = trained_length(target, options.seq_len)
        proxy = make_proxy(target, attention, options.text, length)
    report = _measured(target, options, settings)
    if options.plot is not None and report.views:
        _draw(report, options.plot)
    if proxy is not None and report.views:
        return _swept(report, proxy, recipe, options)
    if options.lr is not None:
        note = f"the rate {options.lr:g} is not judged by a forward alone: add --sweep"
        return replace(report, notes=(*report.notes, note))
    return report


def print_report(report: StabilityReport, options: CheckOptions) -> None:
    """Print a report as a table or as JSON, and write it to ``--markdown``.

    Raises:
        ValueError: if the file cannot be written.
    """
    if options.markdown is not None:
        try:
            Path(options.markdown).write_text(report.to_markdown())
        except OSError as error:
            raise ValueError(
                f"--markdown {options.markdown}: {error.strerror or error}; name a file that can "
                "be written"
            ) from None
    if options.as_json:
        print(dumps(report.to_dict()))
    else:
        from stabmon.check.report.terminal import view

        Console().print(view(report))


def _measured(target: LoadedModel, options: CheckOptions, settings: CheckConfig) -> StabilityReport:
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
    with one_line_errors(failed, MEND):
        report = check_attention_stability(
            target.model, sample, settings, subject=target.subject, analytic=target.analytic
        )
    return replace(report, notes=(*target.notes, *notes, *report.notes))


def _swept(
    report: StabilityReport, proxy: Proxy, recipe: Recipe, options: CheckOptions
) -> StabilityReport:
    """Add a sweep over learning rates to a report."""

    def show(run: ShortRun) -> None:
        if sys.stderr.isatty():
            print(
                f"rate {run.rate:.3g}: largest score {run.scores[-1].max():.3g}, loss "
                f"{run.losses[-1]:.3f}",
                file=sys.stderr,
            )

    with one_line_errors(f"--sweep: training on {proxy.length} tokens a row failed", MEND):
        found = sweep_rates(
            proxy.make,
            proxy.batches,
            recipe,
            options.dtype,
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
    try:
        region_plot(OperatingPoint.of(report.views), report.config, path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--plot {path}: {error}; name a file that can be written, such as region.png"
        ) from None


@dataclass(frozen=True)
class _Judged:
    """The options that the check itself takes."""

    attn: Annotated[str, Known(ATTENTION, "implementation")] | None
    batch: Count
    lr: Annotated[float, Bounds(above=0, below=100)] | None


def _check_options(options: CheckOptions) -> None:
    """Raise a ValueError in one line for an option out of its bounds."""
    check_settings(_Judged(options.attn, options.batch, options.lr), "--")
