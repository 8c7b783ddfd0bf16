"""The command ``stabmon analyze``: from MODEL and a text to figures, numbers and a page."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from stabmon.cli.analyzing.options import KINDS, STORED_KINDS, Options, check_options

OUT = "stabmon_analysis"
LONG = 10.0
"""Seconds from which the time is told beforehand."""


def analyze(
    model: Annotated[
        str | None,
        typer.Argument(
            help=(
                "A folder, a config.json, a hub name, or package.module:callable giving an "
                "nn.Module."
            )
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help=(
                "A text file, token ids as .json, .npy or .pt, or a folder of images for a vision "
                "model."
            )
        ),
    ] = None,
    ids: Annotated[
        str | None,
        typer.Option(
            help=(
                "A file of token ids: .json, .npy, .pt, or whole numbers in a text file, a row a "
                "line."
            )
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help=(
                "rollout, patterns, cake or heatmap; rollout if left out, with --from all that "
                "are stored."
            )
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help=f"Folder for what is found; {OUT} if left out.")
    ] = None,
    stored: Annotated[
        str | None,
        typer.Option(
            "--from", help="Draw again from the numbers in this folder, without the model."
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Numbers and ranges (0,4-7) or a regular expression; all if left out."),
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="Numbers and ranges of query heads; all if left out.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help=(
                "Positions to attribute, or of the query to look at; negative ones count from the "
                "end."
            )
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Stretches of the text, rows of ids, or images.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens a sample; at most 256 if left out.")
    ] = None,
    stack: Annotated[
        str | None,
        typer.Option(
            help="rollout: which stack of a model with several, or joined for encoder and decoder."
        ),
    ] = None,
    weighting: Annotated[
        str | None, typer.Option(help="rollout: gradient, for the class-specific form.")
    ] = None,
    head_fusion: Annotated[
        str | None, typer.Option(help="rollout: mean, max or min over the heads.")
    ] = None,
    cache_size: Annotated[
        str | None,
        typer.Option(
            help=(
                "cake: keys a head keeps on average over layers (128), or a share of the prompt "
                "(0.25)."
            )
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="cake: last queries that judge the keys; 32 if left out.")
    ] = None,
    tau1: Annotated[float | None, typer.Option(help="cake: temperature of the dispersion.")] = None,
    tau2: Annotated[float | None, typer.Option(help="cake: temperature of the shift.")] = None,
    gamma: Annotated[
        float | None, typer.Option(help="cake: weight of the variance in a key's score.")
    ] = None,
    pool: Annotated[
        int | None, typer.Option(help="cake: width of the average over neighbouring keys; odd.")
    ] = None,
    allotment: Annotated[str | None, typer.Option(help="cake: filled or published.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="cake: tokens to generate with the compressed cache.")
    ] = None,
    surface: Annotated[
        bool,
        typer.Option("--surface", help="heatmap: also a 3-D surface of each layer, by plotly."),
    ] = False,
    form: Annotated[str, typer.Option("--format", help="Of the figures: png or svg.")] = "png",
    attn: Annotated[
        str | None, typer.Option(help="sdpa, eager or flex; the model's own choice if left out.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of weights that a config.json alone does not give.")
    ] = 0,
    fail_on: Annotated[
        str, typer.Option(help="What counts as a finding: warning or error.")
    ] = "error",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
) -> None:
    """Show where attention goes, what each token owes to which, and what a KV cache loses."""
    options = Options(
        model=model,
        text=text,
        ids=ids,
        kind=kind,
        out=out,
        stored=stored,
        layers=layers,
        heads=heads,
        target=target,
        samples=samples,
        length=length,
        stack=stack,
        weighting=weighting,
        head_fusion=head_fusion,
        cache_size=cache_size,
        window=window,
        tau1=tau1,
        tau2=tau2,
        gamma=gamma,
        pool=pool,
        allotment=allotment,
        max_new_tokens=max_new_tokens,
        surface=surface or None,
        format=form,
        attn=attn,
        seed=seed,
        fail_on=fail_on,
        as_json=as_json,
    )
    if run(options):
        raise typer.Exit(1)


def run(options: Options) -> int:
    """Analyse, write, print, and return the exit status: 0, or 1 with findings.

    Raises:
        ValueError: for options or input that are wrong, in one line.
    """
    check_options(options)
    _check_libraries(options)
    if options.out is not None:
        _check_folder(Path(options.out))
    if options.stored is not None:
        records = _stored(options.stored, options.kind)
        folder = options.out or options.stored
    else:
        records = [_analysed(options)]
        folder = options.out or OUT
    from stabmon.cli.analyzing.surfaces import surfaces
    from stabmon.cli.analyzing.writing import write_analysis
    from stabmon.report.kinds import page_of

    told, found = [], False
    for record in records:
        page = page_of(record)
        with _working(f"drawing {len(page.pictures)} figures"):
            more = surfaces(record) if options.surface and record.kind == "heatmap" else {}
            files = write_analysis(record, page, folder, options.format, more)
        found = found or page.finds(options.fail_on)
        told.append((record, page, files))
    _print(told, folder, options.as_json)
    return int(found)


def _check_libraries(options: Options) -> None:
    """Refuse before any long work where what draws is not installed.

    Raises:
        ImportError: naming the library and the extra that brings it.
    """
    needed = {"matplotlib": "report", "jinja2": "report", "safetensors": "report"}
    needed |= {"plotly": "plotly"} if options.surface else {}
    for name, extra in needed.items():
        if importlib.util.find_spec(name) is None:
            raise ImportError(f'{name} is not installed: pip install "stabmon[{extra}]"')


def _check_folder(out: Path) -> None:
    """Refuse a folder that cannot be written before any long work."""
    standing = next(each for each in (out.absolute(), *out.absolute().parents) if each.exists())
    if not standing.is_dir():
        raise ValueError(f"--out {out}: {standing.name} is a file; give a folder")
    if not os.access(standing, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out}: {standing} cannot be written; give another folder")


def _stored(folder: str, kind: str | None) -> list[Any]:
    from stabmon.analysis.record import load_record

    if not Path(folder).is_dir():
        raise ValueError(f"--from {folder}: no such folder; give one that stabmon analyze wrote")
    kinds = (
        [kind]
        if kind
        else [each for each in STORED_KINDS if (Path(folder) / f"{each}.json").exists()]
    )
    if not kinds:
        raise ValueError(
            f"--from {folder}: holds no record; give a folder that stabmon analyze wrote"
        )
    return [load_record(folder, each) for each in kinds]


def _analysed(options: Options) -> Any:
    """Load, run, and add to the record what pages and readers need to know."""
    from stabmon.analysis.record import AnalysisRecord
    from stabmon.check.config import ATTENTION
    from stabmon.cli.analyzing.inputs import make_inputs
    from stabmon.cli.analyzing.kinds import estimated_seconds, look, prepared

    if options.attn is not None and options.attn not in ATTENTION:
        raise ValueError(f"--attn {options.attn!r}: use {', '.join(ATTENTION)}")
    kind = options.kind or KINDS[0]
    begin = time.perf_counter()
    with _working(f"loading {options.model}"):
        target = _whole(options, None if options.attn is None else ATTENTION[options.attn])
    inputs = make_inputs(target, options)
    with _one_line(f"{options.model}: the model failed on {inputs.described}"):
        layers = look(target.model, inputs, kind)
        analysis = prepared(target.model, inputs, options, layers)
        seconds = estimated_seconds(layers, inputs, kind, options)
        if seconds >= LONG:
            print(
                f"stabmon: {kind} of {inputs.described} takes about {_duration(seconds)}",
                file=sys.stderr,
            )
        with _working(f"{kind} of {inputs.described}"):
            record = analysis()
    notes = [*target.notes, *inputs.notes, *record.values.get("notes", ())]
    if target.analytic:
        notes.insert(
            0,
            "the weights are random, as the config initialises them: what is shown is the "
            "architecture, not a trained model",
        )
    values = {
        **record.values,
        "model": target.subject,
        "input": inputs.described,
        "samples": inputs.samples,
        "tokens": inputs.tokens,
        "notes": notes,
        "command": _command(options),
        "seconds": round(time.perf_counter() - begin, 2),
    }
    arrays = dict(record.arrays)
    if inputs.images is not None:
        arrays["images"] = inputs.images
    return AnalysisRecord(kind, values, arrays)


def _whole(options: Options, attention: str | None) -> Any:
    """The whole model; a check's one layer of each kind is refused."""
    from stabmon.check.loading.source import load_target

    target = load_target(str(options.model), attention, options.seed)
    if target.whole is not None or any("weights are too large" in note for note in target.notes):
        raise ValueError(
            f"{options.model}: the whole model ({target.parameters:,} parameters) is needed, and "
            "is too large to be made here; "
            "use a smaller one, or stabmon.analysis in your own script"
        )
    return target


def _command(options: Options) -> str:
    """The options that were given, for the record."""
    words = [f"--kind {options.kind or KINDS[0]}"]
    skipped = {
        "model",
        "text",
        "ids",
        "kind",
        "out",
        "stored",
        "format",
        "fail_on",
        "as_json",
        "seed",
    }
    for name, value in vars(options).items():
        if name not in skipped and value is not None:
            words.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(words)


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn what a model raises into a ValueError of one line; transformers keeps quiet
    meanwhile.
    """
    from stabmon.check.loading.pretrained import quiet

    try:
        with quiet():
            yield
    except (ValueError, ImportError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{what} ({type(error).__name__}: {reason}); give input that it takes, or fewer samples"
        ) from error


@contextmanager
def _working(what: str) -> Iterator[None]:
    """Show on a terminal's standard error what is being done."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(f"{what} …"):
        yield


def _duration(seconds: float) -> str:
    """Write a duration roughly.

    >>> _duration(42), _duration(400), _duration(9000)
    ('40 s', '7 min', '2.5 h')
    """
    if seconds < 90:
        return f"{round(seconds, -1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _print(told: list[tuple[Any, Any, list[str]]], folder: str, as_json: bool) -> None:
    if as_json:
        from stabmon._storage.strict_json import dumps

        objects = [_summary(record, page, files, folder) for record, page, files in told]
        print(
            dumps(objects[0] if len(objects) == 1 else {"schema_version": 1, "analyses": objects})
        )
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for record, page, files in told:
        console.print(Text(page.title, style="bold"))
        for paragraph in page.verdict:
            console.print(Text(paragraph))
        overlay = _overlay(record)
        if overlay is not None:
            console.print(Text("what is owed to each token, 9 the most:", style="dim"))
            console.print(overlay)
        for finding in page.findings:
            style = {"error": "bold red", "warning": "bold yellow"}.get(finding.severity, "bold")
            console.print(Text.assemble((finding.severity, style), f"  {finding.text}"))
        for note in page.notes:
            console.print(Text(f"note: {note}", style="dim"))
        console.print(Text(f"{Path(folder) / files[0]} and {len(files) - 1} files beside it"))


def _summary(record: Any, page: Any, files: list[str], folder: str) -> dict[str, Any]:
    values = record.values
    return {
        "schema_version": 1,
        "kind": record.kind,
        "model": values.get("model"),
        "input": values.get("input"),
        "samples": values.get("samples"),
        "verdict": list(page.verdict),
        "findings": [vars(finding) for finding in page.findings],
        "notes": list(page.notes),
        "numbers": dict(page.numbers),
        "seconds": values.get("seconds"),
        "out": str(folder),
        "files": list(files),
    }


def _overlay(record: Any) -> Any:
    """A rollout's first sample for the terminal, where it is a text of bearable length."""
    if record.kind != "rollout":
        return None
    from stabmon.report.rollout import terminal_overlay

    return terminal_overlay(record)
