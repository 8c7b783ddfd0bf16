"""The ``stabmon`` command. Exit status: 0 done, 1 done with findings, 2 the call or its input is
wrong (one line says what).
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from stabmon.cli import analyze as analyze_command
from stabmon.registry import Registry

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
FailOn = Annotated[str, typer.Option(help="What counts as a finding: warning or error.")]


@app.callback()
def stabmon() -> None:
    """See attention go wrong during transformer training, before the loss shows it."""


app.command("analyze")(analyze_command.analyze)


@app.command("list")
def list_(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="signals, rules, interventions, controllers, sinks or evictions; all if left out."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """What there is to measure, to judge by, to act with and to write to."""
    registries = _registries()
    if kind is not None and kind not in registries:
        raise ValueError(f"unknown kind {kind!r}. Known: {', '.join(registries)}")
    chosen = {name: registry for name, registry in registries.items() if kind in (None, name)}
    if as_json:
        print(json.dumps({name: dict(_entries(registry)) for name, registry in chosen.items()}))
        return
    for name, registry in chosen.items():
        table = Table(title=name, title_justify="left", box=None, show_header=False, padding=(0, 2))
        for entry, line in _entries(registry):
            table.add_row(entry, line)
        Console().print(table)


@app.command()
def check(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder, a config.json, a hub name, or package.module:callable giving an "
            "nn.Module."
        ),
    ],
    seq_len: Annotated[
        int | None,
        typer.Option(min=2, help="Length to train at, in tokens; the config's own if left out."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Precision to train in: fp16, bf16 or fp32.")] = "fp32",
    attn: Annotated[
        str | None, typer.Option(help="sdpa, eager or flex; the model's own choice if left out.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="A file to take the sample from; random tokens if left out.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences in the sample.")] = 1,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate to judge; --sweep tries rates around it."),
    ] = None,
    schedule: Annotated[
        str, typer.Option(help="constant, linear or cosine, and warm-up steps: cosine:20.")
    ] = "constant",
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep", help="Train a few dozen steps at several rates, and say which blows up."
        ),
    ] = False,
    region: Annotated[
        bool,
        typer.Option("--region", help="Which temperatures, head sizes and lengths are stable."),
    ] = False,
    plot: Annotated[
        str | None, typer.Option(help="Draw the stability region into this file.")
    ] = None,
    markdown: Annotated[
        str | None, typer.Option(help="Also write the report into this file.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    fail_on: FailOn = "error",
    as_json: Json = False,
) -> None:
    """Whether a model's attention is going to be stable, before it is trained, and what to change
    if not.
    """
    from stabmon.cli.check import CheckOptions, run

    _check_severity(fail_on)
    asked = CheckOptions(
        model,
        seq_len,
        dtype,
        attn,
        text,
        batch,
        seed,
        lr,
        schedule,
        sweep,
        region,
        plot,
        as_json,
        markdown,
        fail_on,
    )
    if run(asked):
        raise typer.Exit(1)


@app.command()
def train(
    config: Annotated[
        str, typer.Argument(help="A YAML file, such as those in configs/controllers.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Settings to lay over it.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Learn this file in place of the default corpus.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train attention controllers on a corpus, on a frozen base and with it, and compare them with
    controls of the same size.
    """
    from stabmon.cli.train import train as run

    run(config, overrides or [], text=text, as_json=as_json)


@app.command()
def watch(
    run_dir: Annotated[
        str, typer.Argument(help="The run's output folder, or the stabmon folder in it.")
    ],
    once: Annotated[bool, typer.Option("--once", help="Show the present state and leave.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 2.0,
    fail_on: FailOn = "error",
    as_json: Json = False,
) -> None:
    """A run's layers and open issues, live from its records, until Ctrl-C."""
    from stabmon.sinks.reader import read_records

    _check_severity(fail_on)
    records = read_records(run_dir)
    if as_json:
        latest = records.readings[-1].step if records.readings else None
        issues = [issue.to_dict() for issue in records.issues]
        print(
            json.dumps(
                {"step": latest, "readings": len(records.readings), "issues": issues}, default=str
            )
        )
    elif once or not sys.stdout.isatty():
        Console().print(_view(records))
    else:
        with Live(_view(records), refresh_per_second=4) as live:
            try:
                while True:
                    time.sleep(every)
                    records = read_records(run_dir)
                    live.update(_view(records))
            except KeyboardInterrupt:
                pass
    if _finds(records, fail_on):
        raise typer.Exit(1)


def main() -> None:
    """Run the command; a wrong call or input is one line on standard error and exit status 2."""
    try:
        status = app(standalone_mode=False)
    except (ValueError, ImportError, OSError) as error:
        _leave(str(error))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:
        if not hasattr(
            error, "format_message"
        ):  # what typer's own usage errors have, wherever it keeps their class
            raise
        _leave(error.format_message())
    sys.exit(status if isinstance(status, int) else 0)


def _leave(message: str) -> None:
    print(f"stabmon: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _registries() -> dict[str, Registry[Any]]:
    from stabmon.analysis.kv_cache import POLICIES
    from stabmon.controllers import CONTROLLERS
    from stabmon.interventions import INTERVENTIONS
    from stabmon.rules import RULES
    from stabmon.signals import SIGNALS
    from stabmon.sinks import SINKS

    return {
        "signals": SIGNALS,
        "rules": RULES,
        "interventions": INTERVENTIONS,
        "controllers": CONTROLLERS,
        "sinks": SINKS,
        "evictions": POLICIES,
    }


def _entries(registry: Registry[Any]) -> Iterator[tuple[str, str]]:
    """Name and first sentence of everything of one kind."""
    for name, entry in registry.items():
        yield name, (inspect.getdoc(getattr(entry, "function", entry)) or "").split("\n")[0]


def _check_severity(fail_on: str) -> None:
    if fail_on not in ("warning", "error"):
        raise ValueError(f"--fail-on {fail_on!r}: use warning or error")


def _finds(records: Any, fail_on: str) -> bool:
    from stabmon.records import SEVERITIES

    least = SEVERITIES.index("warning" if fail_on == "warning" else "error")
    return any(SEVERITIES.index(issue.severity) >= least for issue in records.issues)


def _view(records: Any) -> Table:
    """The newest reading, a row a layer, over the issues that are open."""
    from stabmon.sinks.scalars import dashboard_scalars

    shown = (
        "normalized_entropy",
        "max_logit",
        "max_probability",
        "hnf_log_curvature",
        "precision_bits",
    )
    if not records.readings:
        return Table(title=f"{records.folder}: no reading yet")
    reading = records.readings[-1]
    loss = "unknown" if reading.loss is None else f"{reading.loss:.4f}"
    table = Table(
        title=f"step {reading.step}, loss {loss}, {len(records.readings)} readings",
        title_justify="left",
    )
    for name in ("layer", *shown):
        table.add_column(
            name.replace("_", " "), justify="left" if name == "layer" else "right", overflow="fold"
        )
    scalars = dashboard_scalars(reading, (), alarms=0)
    for layer in reading.layers:
        values = [scalars.get(f"attention_layers/{layer}/{name}") for name in shown]
        table.add_row(layer, *("–" if value is None else f"{value:.3g}" for value in values))
    table.caption = "\n".join(_open_lines(records)) or "no issue is open"
    table.caption_justify = "left"
    return table


def _open_lines(records: Any) -> list[str]:
    newest = records.runs[-1] if records.runs else records
    latest = {issue.key: issue for issue in newest.issues}
    open_ = [issue for issue in latest.values() if issue.state != "closed"]
    return [
        f"{i.severity}: {i.issue_type}, {i.where}, since step {i.step}, value {i.value:.4g}"
        for i in open_
    ]
