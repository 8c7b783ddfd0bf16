"""The command ``stabmon wandb-workspace``."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from stabmon.cli.outputs import prove_file


def wandb_workspace(
    entity: Annotated[
        str, typer.Option(envvar="WANDB_ENTITY", help="User or team; your own if left out.")
    ] = "",
    project: Annotated[
        str, typer.Option(envvar="WANDB_PROJECT", help="Project of the runs.")
    ] = "stabmon",
    name: Annotated[str, typer.Option(help="Name of the view.")] = "stabmon",
    out: Annotated[
        Path | None, typer.Option(help="Write the view to this file as JSON too.")
    ] = None,
) -> None:
    """Save the ready-made view of a W&B project; offline, print it as JSON."""
    if out is not None:
        prove_file(str(out), "--out")
    workspace = _workspace(entity, project, name)
    online = _is_online()
    if online:
        _save(workspace)
    # Workspace._to_model: the view as it is sent. wandb-workspaces has no public way to write it
    # to a file; checked with 0.4.13.
    text = workspace._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2)
    if out is not None:
        out.write_text(f"{text}\n", encoding="utf-8")
    elif not online:
        print(text)
    if not online:
        where = "on standard output" if out is None else f"in {out}"
        print(
            f"stabmon: not saved, since W&B is offline or has no API key; the view is {where}",
            file=sys.stderr,
        )


def _is_online() -> bool:
    """Return whether W&B is on and has credentials, without asking for any.

    Raises:
        ValueError: if the server cannot be reached or refuses them.
    """
    import wandb

    if os.environ.get("WANDB_MODE", "online") not in ("online", "shared"):
        return False
    try:
        return bool(wandb.login(prompt=False))
    except wandb.Error as error:
        raise ValueError(
            f"W&B refused the login ({error}): run `wandb login`, or set WANDB_MODE=offline to get "
            "the view as JSON"
        ) from error


def _save(workspace: Any) -> None:
    """Save a new view; W&B prints its address.

    Raises:
        ValueError: if W&B does not take it.
    """
    try:
        workspace.save()
    except Exception as error:  # whatever the client of the server raises
        raise ValueError(
            f"W&B did not save the view ({type(error).__name__}: {error}): check --entity and "
            "--project, or set WANDB_MODE=offline to get it as JSON"
        ) from error


def _workspace(entity: str, project: str, name: str) -> Any:
    """Return the view: the state of the run first, then loss, extremes, heads and layers."""
    try:
        workspaces: Any = importlib.import_module("wandb_workspaces.workspaces")
        v2: Any = importlib.import_module("wandb_workspaces.reports.v2")
    except ImportError as error:
        raise ImportError(
            'wandb-workspaces is not installed: pip install "stabmon[workspace]"'
        ) from error
    from stabmon.config import StabilityConfig
    from stabmon.sinks.dashboards.head_pictures import EVERY_HEAD
    from stabmon.sinks.dashboards.panels import LAYER_SIGNALS, LAYERS, MARKER, telling
    from stabmon.sinks.dashboards.wandb_metrics import STEP

    def lines(title: str, *names: str, **more: Any) -> Any:
        return v2.LinePlot(title=title, x=STEP, y=list(names), **more)

    extremes = [
        lines(
            f"{signal}: largest, mean and smallest head",
            *(f"attention/{signal}/{how}" for how in ("max", "mean", "min")),
        )
        for signal in telling(StabilityConfig().signals)
    ]
    layers = [
        v2.LinePlot(
            title=f"{signal} of every layer that is logged",
            x=STEP,
            metric_regex=f"^{LAYERS}.*/{signal}$",
        )
        for signal in LAYER_SIGNALS
    ]
    sections = {
        "Stability": [
            lines("Risk that attention damages the run", "stability/risk", range_y=(0.0, 1.0)),
            lines("Open issues, and alarms so far", "stability/issues_open", "stability/alarms"),
            lines("Interventions", MARKER, range_y=(0.0, 1.0)),
            lines("Share of the scheduled learning rate", "stability/learning_rate_factor"),
            v2.WeavePanelSummaryTable(table_name="stability/issues"),
            v2.WeavePanelSummaryTable(table_name="stability/interventions"),
        ],
        "Loss and learning rate": [
            v2.LinePlot(title="Loss", metric_regex=r"(?i)(^|[/_])loss$"),
            v2.LinePlot(title="Learning rate", metric_regex=r"(?i)(^|[/_])(lr|learning_rate)\b"),
        ],
        "Extremes over all heads": extremes,
        "Every head, now and over the run": [
            v2.MediaBrowser(
                title="Entropy and largest score of every head",
                media_keys=[f"attention_heatmap/{EVERY_HEAD}"],
                num_columns=1,
                gallery_axis="step",
                layout=v2.Layout(w=24, h=18),
            )
        ],
        "Layers": layers,
    }
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            workspaces.Section(name=title, panels=panels, is_open=True)
            for title, panels in sections.items()
        ],
        settings=workspaces.WorkspaceSettings(group_by_prefix="first"),
        auto_generate_panels=True,  # else the user's own panels are hidden
    )
