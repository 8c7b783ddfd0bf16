"""The command ``stabmon report``."""

from __future__ import annotations

import sys
from pathlib import Path

from stabmon.cli.options import check_fail_on, command
from stabmon.cli.outputs import prove_file, prove_folder
from stabmon.cli.reporting.options import ReportOptions


@command(ReportOptions)
def report(options: ReportOptions) -> bool:
    """Write one page of one or several runs: verdict, timeline, every head, side by side."""
    check_fail_on(options.fail_on)
    from stabmon.cli.reporting.find_runs import find_run

    found = [find_run(each) for each in options.runs]
    for each in found:
        if each.note:
            print(f"stabmon: {each.note}", file=sys.stderr)
    from stabmon.report.run.loading import load_runs
    from stabmon.report.run.page import PAGE, write_page
    from stabmon.report.run.verdict import has_finding

    if options.out is not None:
        out = Path(options.out)
    elif len(found) == 1:
        inner = found[0].folder / "stabmon"
        out = (inner if inner.is_dir() else found[0].folder) / PAGE
    else:
        out = Path(PAGE)
    if out.parent.is_dir():
        prove_file(str(out), "--out")
    else:
        prove_folder(str(out.parent), "--out")
    from stabmon.cli.progress import working

    with working("reading records"):
        runs = load_runs([(each.folder, each.number) for each in found])
    with working("writing the page"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_page(runs, out)
    from stabmon.cli.reporting.printing import print_verdicts

    print_verdicts(runs, out, options.as_json)
    return any(has_finding(run, options.fail_on) for run in runs)
