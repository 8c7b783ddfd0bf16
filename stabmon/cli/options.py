"""Options shared by several commands, and commands made from dataclasses of options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
FailOn = Annotated[str, typer.Option(help="What counts as a finding: warning or error.")]
Attention = Annotated[
    str | None, typer.Option(help="sdpa, eager or flex; the model's own choice if left out.")
]
Options = TypeVar("Options")


def command(
    options: type[Options],
) -> Callable[[Callable[[Options], bool]], Callable[..., None]]:
    """Turn a function of a dataclass of options into a typer command.

    Each field of the dataclass is one argument or option, declared once with typer's annotation.

    Args:
        options: dataclass whose fields are annotated with ``typer.Argument`` or ``typer.Option``.

    Returns:
        A decorator for functions that return True if they find something, which becomes exit
        status 1.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Greeting:
        ...     name: Annotated[str, typer.Argument()]
        ...     loud: Annotated[bool, typer.Option("--loud")] = False
        >>> @command(Greeting)
        ... def greet(options: Greeting) -> bool:
        ...     print("HELLO" if options.loud else "hello", options.name)
        ...     return False
        >>> greet(name="you", loud=True)
        HELLO you
        >>> list(inspect.signature(greet).parameters)
        ['name', 'loud']
    """
    hints = get_type_hints(options, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(options)  # type: ignore[arg-type]
    ]

    def decorate(run: Callable[[Options], bool]) -> Callable[..., None]:
        def call(**given: Any) -> None:
            if run(options(**given)):
                raise typer.Exit(1)

        call.__name__, call.__doc__ = run.__name__, run.__doc__
        call.__annotations__ = hints
        vars(call)["__signature__"] = inspect.Signature(parameters)  # typer reads both
        return call

    return decorate


def check_fail_on(fail_on: str) -> None:
    """Check ``--fail-on``.

    Raises:
        ValueError: if it is neither ``warning`` nor ``error``.
    """
    if fail_on not in ("warning", "error"):
        raise ValueError(f"--fail-on {fail_on!r}: use warning or error")
