"""The live view of rich: without keys, where textual is not installed."""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from stabmon.cli.watching.follower import Follower
from stabmon.cli.watching.screen import Chosen, Screen
from stabmon.cli.watching.words import fitting, wrapped
from stabmon.sinks.stored.run_tail import RunState

FOOTER = 'Ctrl-C leaves · for keys: pip install "stabmon[watch]"'


def show(follower: Follower) -> RunState | None:
    """Show the run until Ctrl-C.

    Args:
        follower: looks at the run.

    Returns:
        The run as last seen; None where there was none.
    """
    console = Console()
    follower.start()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                live.update(_view(follower, *console.size), refresh=True)
                time.sleep(min(1.0, follower.every))
        except KeyboardInterrupt:
            follower.stop()
    return follower.state


def _view(follower: Follower, width: int, height: int) -> Group:
    state = follower.state
    if state is None:
        lines = [Text("stabmon watch", "bold"), *wrapped(follower.waiting(), width)]
        lines += [Text()] * (height - 1 - len(lines)) + [Text(FOOTER, "dim")]
    else:
        lines = Screen(state, Chosen(footer=FOOTER)).lines(width, height)
    return Group(*fitting(lines))
