"""The live view of textual, with keys."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Group
from rich.text import Text
from textual import events
from textual.app import App, ComposeResult
from textual.widgets import Input, Static

from stabmon.cli.watching.follower import Follower
from stabmon.cli.watching.help_page import help_lines
from stabmon.cli.watching.layer_page import layer_lines
from stabmon.cli.watching.screen import Chosen, Screen
from stabmon.cli.watching.words import fitting, printable, wrapped

KEYS = "j k layer · Enter its signals · n N issue · / find · s signal · ? help · q quit"


class WatchApp(App[None]):
    """Screen of a run that follows its records.

    Colours are the terminal's own, on the terminal's own background.

    Args:
        follower: looks at the run; started and stopped here.
    """

    CSS = """
    Screen, #page, Input, Input:focus { background: ansi_default; color: ansi_default; }
    #page { height: 1fr; width: 100%; }
    Input { dock: bottom; height: 1; border: none; padding: 0; display: none; }
    """
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, follower: Follower) -> None:
        super().__init__(ansi_color=True)
        self.follower = follower
        self.chosen = Chosen(footer=KEYS)
        self._page = "run"
        self._shown: tuple[object, ...] = ()

    def compose(self) -> ComposeResult:
        """Make the page, and the line to type into."""
        yield Static(id="page")
        yield Input(placeholder="part of a layer's name, Enter to go on", compact=True)

    def on_mount(self) -> None:
        """Begin to look."""
        self.follower.on_news = lambda: self.call_from_thread(self.draw)
        self.follower.start()
        self.query_one("#page").can_focus = True
        self.query_one("#page").focus()
        self.draw()

    def on_unmount(self) -> None:
        """Stop looking."""
        self.follower.on_news = None
        self.follower.stop()

    def on_resize(self) -> None:
        """Fit the page to the terminal."""
        self.draw()

    def draw(self) -> None:
        """Draw the present page."""
        width, height = self.size
        state = self.follower.state
        title = self.follower.waiting() if state is None else Screen(state).title(width).plain
        shown = (state, self.follower.history, self.chosen, self._page, width, height, title)
        if len(shown) == len(self._shown) and all(map(_is_same, shown, self._shown)):
            return
        self._shown = shown
        self.query_one("#page", Static).update(Group(*fitting(self._lines(width, height))))

    def on_key(self, event: events.Key) -> None:
        """Move, choose, open and leave."""
        if self.query_one(Input).has_focus:
            if event.key == "escape":
                self._find("", done=True)
            return
        moves = {"j": 1, "down": 1, "k": -1, "up": -1}
        if event.key in moves:
            self._move(moves[event.key])
        elif event.character in ("n", "N"):
            step = 1 if event.character == "n" else -1
            self.chosen = replace(self.chosen, incident=self.chosen.incident + step)
        elif event.key == "s":
            self.chosen = replace(self.chosen, signal=self.chosen.signal + 1)
        elif event.key == "enter":
            self._open_layer()
        elif event.key == "escape":
            self._back()
        elif event.character == "?":
            self._page = "run" if self._page == "help" else "help"
        elif event.character == "/":
            self._page = "run"
            line = self.query_one(Input)
            line.display = True
            line.focus()
        elif event.key == "q":
            self.exit()
        else:
            return
        event.stop()
        self.draw()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Show the layers that match so far."""
        self._find(event.value)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Keep the filter and go back to the keys."""
        self._find(event.value, done=True)

    def _lines(self, width: int, height: int) -> list[Text]:
        state = self.follower.state
        if self._page == "help":
            return help_lines(width, height)
        if state is None:
            return [Text("stabmon watch", "bold"), *wrapped(self.follower.waiting(), width)]
        screen = Screen(state, self.chosen)
        layer = self._layer(screen)
        if self._page == "layer" and state.reading is not None and layer is not None:
            issues = [issue for issue in state.open_issues if issue.layer == layer]
            lines = layer_lines(
                layer, state.reading, self.follower.history, issues, width, height - 1
            )
            lines += [Text()] * (height - 1 - len(lines))
            return [*lines, Text("j k next layer · Esc back · q quit", "dim")]
        if layer is not None:
            footer = f"{printable(layer)} selected · Enter its signals · Esc none"
            screen = replace(screen, chosen=replace(self.chosen, footer=footer))
        return screen.lines(width, height)

    def _layer(self, screen: Screen) -> str | None:
        if self.chosen.layer is None or not screen.layers:
            return None
        return screen.layers[min(self.chosen.layer, len(screen.layers) - 1)]

    def _move(self, by: int) -> None:
        """Select the next or previous layer; the first key selects the first one."""
        state = self.follower.state
        layers = [] if state is None else Screen(state, self.chosen).layers
        if layers:
            old = self.chosen.layer
            new = (0 if by > 0 else -1) if old is None else min(old, len(layers) - 1) + by
            self.chosen = replace(self.chosen, layer=new % len(layers))
        if self._page == "layer":
            self._open_layer()

    def _open_layer(self) -> None:
        """Open the selected layer; else the first with an open issue, else the first."""
        state = self.follower.state
        if state is None or state.reading is None:
            return
        screen = Screen(state, self.chosen)
        if not screen.layers:
            return
        if self.chosen.layer is None:
            with_issue = {issue.layer for issue in state.open_issues}
            first = next((n for n, name in enumerate(screen.layers) if name in with_issue), 0)
            self.chosen = replace(self.chosen, layer=first)
        self._page = "layer"
        self.follower.want(self._layer(Screen(state, self.chosen)))

    def _back(self) -> None:
        """Go back to the run; there, end the selection and the filter."""
        if self._page == "run":
            self.chosen = replace(self.chosen, layer=None, filter="")
            self.query_one(Input).value = ""
        self._page = "run"
        self.follower.want(None)

    def _find(self, text: str, done: bool = False) -> None:
        self.chosen = replace(self.chosen, filter=text.strip(), layer=None)
        if done:
            line = self.query_one(Input)
            line.value = text
            line.display = False
            self.query_one("#page").focus()
        self.draw()


def _is_same(new: object, old: object) -> bool:
    """Return whether two values are the same object, or equal plain ones."""
    return new is old or (isinstance(new, str | int | Chosen) and new == old)
