"""The command ``stabmon analyze``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from stabmon.cli.analyzing.options import STORED_KINDS, AnalyzeOptions, check_options
from stabmon.cli.options import command
from stabmon.cli.outputs import prove_folder

OUT = "stabmon_analysis"
"""Default folder for the results; the help of ``--out`` names it."""


@command(AnalyzeOptions)
def analyze(options: AnalyzeOptions) -> bool:
    """Show where attention goes, what each token owes to which, and what a KV cache loses."""
    check_options(options)
    _check_libraries(options)
    folder = options.out or options.stored or OUT
    prove_folder(folder, "--from" if folder == options.stored else "--out")
    if options.stored is not None:
        records = _stored(options.stored, options.kind)
    else:
        from stabmon.cli.analyzing.run import analysed

        records = [analysed(options)]
    from stabmon.cli.analyzing.printing import print_results
    from stabmon.cli.analyzing.surfaces import surfaces
    from stabmon.cli.analyzing.writing import write_analysis
    from stabmon.cli.progress import working
    from stabmon.report.kinds import page_of

    results = []
    for record in records:
        page = page_of(record)
        with working(f"drawing {len(page.pictures)} figures"):
            more = surfaces(record) if options.surface and record.kind == "heatmap" else {}
            files = write_analysis(record, page, folder, options.format, more)
        results.append((record, page, files))
    print_results(results, folder, options.as_json)
    return any(page.finds(options.fail_on) for _, page, _ in results)


def _check_libraries(options: AnalyzeOptions) -> None:
    """Check before any long work that all libraries for drawing are installed.

    Raises:
        ImportError: if one is missing.
    """
    needed = {"matplotlib": "report", "jinja2": "report", "safetensors": "report"}
    needed |= {"plotly": "plotly"} if options.surface else {}
    for name, extra in needed.items():
        if importlib.util.find_spec(name) is None:
            raise ImportError(f'{name} is not installed: pip install "stabmon[{extra}]"')


def _stored(folder: str, kind: str | None) -> list[Any]:
    """Load the records of one kind, or of all kinds, from a folder.

    Raises:
        ValueError: if there are none.
    """
    from stabmon.analysis.record import load_record

    if not Path(folder).is_dir():
        raise ValueError(f"--from {folder}: no such folder; give one that stabmon analyze wrote")
    stored = [each for each in STORED_KINDS if (Path(folder) / f"{each}.json").exists()]
    kinds = [kind] if kind else stored
    if not kinds:
        raise ValueError(
            f"--from {folder}: holds no record; give a folder that stabmon analyze wrote"
        )
    return [load_record(folder, each) for each in kinds]
