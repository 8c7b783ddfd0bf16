"""Command line of stabmon.

Exit status: 0 done; 1 done, with findings; 2 wrong call or input, named in one line; 130
interrupted.
A command's module is imported when the command is asked for, and loads what it needs when it runs,
so that neither help nor a wrong call waits for torch.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

COMMANDS = {
    "check": "stabmon.cli.check:check",
    "train": "stabmon.cli.train:train",
    "report": "stabmon.cli.report:report",
    "watch": "stabmon.cli.watch:watch",
    "wandb-workspace": "stabmon.cli.wandb_workspace:wandb_workspace",
    "analyze": "stabmon.cli.analyze:analyze",
    "list": "stabmon.cli.list_registered:list_registered",
}
"""Command -> module and function; a line here adds a command."""


class Commands(TyperGroup):
    """Group of commands, each imported when it is asked for.

    Example:
        >>> group = typer.main.get_command(app)
        >>> group.list_commands(None)[0], group.get_command(None, "check").name
        ('check', 'check')
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """List the names of all commands, in the order of help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of a name; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, function = COMMANDS[cmd_name].partition(":")
        run = getattr(import_module(module), function)
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name, short_help=run.__doc__.partition("\n")[0])(run)
        return typer.main.get_command(single)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return name, command and arguments of a call.

        Raises:
            ValueError: for an unknown command.
        """
        if args and args[0] not in COMMANDS:
            raise ValueError(f"no command {args[0]!r}; use {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from stabmon import __version__

        print(f"stabmon {__version__}")
        raise typer.Exit


@app.callback()
def stabmon(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    """See attention go wrong during transformer training, before the loss shows it."""


def main() -> None:
    """Run the command and exit; a wrong call or input is one line and exit status 2.

    Raises:
        SystemExit: always, with the exit status.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a dash must not fail on a terminal of ASCII
        sys.stdout.reconfigure(errors="replace")
    atexit.register(gc.freeze)  # else Python's end walks all of torch again, for one or two seconds
    try:
        status = app(sys.argv[1:] or ["--help"], prog_name="stabmon", standalone_mode=False)
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # typer turns the first into the second
        _leave_pipe()
    except (ValueError, ImportError) as error:
        _refuse(str(error))
    except OSError as error:
        named = "" if error.filename is None else f"{error.filename}: "
        _refuse(f"{named}{error.strerror or error}")
    except (typer.Abort, KeyboardInterrupt):
        status = 130
    except Exception as error:
        # typer's usage errors all have this method; the module of their class has moved before
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        command = "stabmon" if context is None else context.command_path
        _refuse(f"{error.format_message().rstrip('.')}; see {command} --help")
    if status == 130:
        _end("interrupted", 130)
    sys.exit(status if isinstance(status, int) else 0)


def _refuse(message: str) -> None:
    """Print one line on standard error and exit with status 2."""
    _end(message, 2)


def _end(message: str, status: int) -> None:
    print(f"stabmon: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def _leave_pipe() -> None:
    """Exit as ``head`` and its like expect, once the reader of the output has gone."""
    with contextlib.suppress(OSError, ValueError):  # the interpreter flushes once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)
