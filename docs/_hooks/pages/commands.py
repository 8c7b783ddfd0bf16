"""The page of the command line, from the commands themselves."""

from __future__ import annotations

from typing import Any

import typer.main
from markup import cell, table, to_markdown

from stabmon.cli import COMMANDS, app

INTRO = """# Commands

Exit status 0: done, no finding. 1: done, with findings. 2: the call or its input is wrong; one line
on standard error names what, and what to change.
"""


def page() -> str:
    """Return the page."""
    group: Any = typer.main.get_command(app)
    return "\n".join([INTRO, *(_command(name, group.get_command(None, name)) for name in COMMANDS)])


def _command(name: str, command: Any) -> str:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    usage = " ".join(["stabmon", name, *(_usage(each) for each in arguments), "[OPTIONS]"])
    rows = [
        (f"`{_spelled(each)}`", cell(_default(each)), cell(getattr(each, "help", "") or ""))
        for each in command.params
        if each.name != "help"
    ]
    text = to_markdown(command.help or "")
    return f"## stabmon {name}\n\n```sh\n{usage}\n```\n\n{text}\n\n" + table(
        ("argument", "default", "meaning"), rows
    )


def _usage(argument: Any) -> str:
    name = argument.make_metavar_name() if hasattr(argument, "make_metavar_name") else ""
    name = name or (argument.metavar or argument.name).upper()
    several = "..." if argument.nargs == -1 else ""
    return f"{name}{several}" if argument.required else f"[{name}{several}]"


def _spelled(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return (parameter.metavar or parameter.name).upper()
    return ", ".join([*parameter.opts, *parameter.secondary_opts])


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    return "" if value is None or value == () or callable(value) else f"`{value}`"
