"""Command line of stabmon.

Exit status: 0 done; 1 done, with findings; 2 wrong call or input, named in one line. Commands load
what they need when they run, so that importing this package stays light.
"""

from __future__ import annotations

import sys

import typer

from stabmon.cli import analyze, check, list, report, train, wandb_workspace, watch

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def stabmon() -> None:
    """See attention go wrong during transformer training, before the loss shows it."""


app.command("analyze")(analyze.analyze)
app.command("list")(list.list_registered)
app.command("check")(check.check)
app.command("train")(train.train)
app.command("report")(report.report)
app.command("watch")(watch.watch)
app.command("wandb-workspace")(wandb_workspace.wandb_workspace)


def main() -> None:
    """Run the command and exit; a wrong call or input is one line and exit status 2.

    Raises:
        SystemExit: always, with the exit status.
    """
    try:
        status = app(standalone_mode=False)
    except (ValueError, ImportError, OSError) as error:
        _refuse(str(error))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:
        # typer's usage errors all have this method; the module of their class has moved before
        if not hasattr(error, "format_message"):
            raise
        _refuse(error.format_message())
    sys.exit(status if isinstance(status, int) else 0)


def _refuse(message: str) -> None:
    """Print one line on standard error and exit with status 2."""
    print(f"stabmon: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
