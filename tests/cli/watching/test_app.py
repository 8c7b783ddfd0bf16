"""The live views: keys through textual's own pilot, and both views on a real terminal."""

import asyncio
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from stabmon.cli.watching.app import WatchApp
from stabmon.cli.watching.follower import Follower
from tests.support.interruptible import interruptible
from tests.support.written_records import collapse, opened, store, wide_reading


def screen(app: WatchApp) -> list[str]:
    strips = app.screen._compositor.render_strips()
    return ["".join(segment.text for segment in strip) for strip in strips]


async def until(pilot: Any, holds: Callable[[], bool]) -> None:
    """Wait until something holds, at most ten seconds."""
    for _ in range(200):
        await pilot.pause(0.05)
        if holds():
            return
    raise AssertionError("\n".join(screen(pilot.app)))


def piloted(path: Path, script: Callable[[WatchApp, Any], Awaitable[None]]) -> None:
    async def go() -> None:
        app = WatchApp(Follower(path, 0.1))
        async with app.run_test(size=(80, 24)) as pilot:
            await script(app, pilot)

    asyncio.run(go())


def has(app: WatchApp, part: str) -> Callable[[], bool]:
    return lambda: any(part in line for line in screen(app))


def test_keys_move_open_find_and_leave(tmp_path: Path) -> None:
    sink = store(tmp_path / "stabmon", range(10, 110, 10), layers=32, heads=16)
    spike = {"layer": None, "head": None, "issue_type": "loss_spike", "severity": "warning"}
    sink.write_issue(collapse(80, **spike, eta_steps=None))
    sink.write_issue(collapse(90, layer=4))
    sink.close()

    async def script(app: WatchApp, pilot: Any) -> None:
        await until(pilot, has(app, "32 layers"))
        assert len(screen(app)) == 24
        assert all(len(line) == 80 for line in screen(app))
        state = app.follower.state
        assert state is not None
        first, second = state.open_incidents
        assert has(app, first.advice[:30])()
        await pilot.press("n")
        assert has(app, second.numbers[:30])()
        await pilot.press("N")
        assert has(app, first.advice[:30])()
        await pilot.press("enter")  # none is selected: the first layer with an issue
        await until(pilot, has(app, "steps 10-100"))
        assert has(app, "h.4.attn: layer 5 of 32")()
        await pilot.press("j", "down")
        assert has(app, "h.6.attn: layer 7 of 32")()
        await pilot.press("k", "up", "k")
        assert has(app, "h.3.attn: layer 4 of 32")()
        await pilot.press("escape")
        assert has(app, "h.3.attn selected")()
        await pilot.press("slash", "1", "2", "enter")
        assert has(app, "1 layer × heads")()
        await pilot.press("escape")
        assert has(app, "32 layers × heads: entropy")()
        await pilot.press("s")
        assert has(app, "32 layers × heads: largest score")()
        await pilot.press("question_mark")
        assert has(app, "next and previous open incident")()
        await pilot.press("escape", "q")
        await pilot.pause()
        assert not app.is_running

    piloted(tmp_path, script)


def test_a_run_is_awaited_and_followed(tmp_path: Path) -> None:
    async def script(app: WatchApp, pilot: Any) -> None:
        await until(pilot, has(app, "there is no such folder"))
        (tmp_path / "runs").mkdir()
        await until(pilot, has(app, "first optimizer step"))
        sink = opened(tmp_path / "runs" / "one" / "stabmon")
        await until(pilot, has(app, "due at step 10"))
        sink.write_reading(wide_reading(10), {})
        await until(pilot, has(app, "step 10 "))
        sink.write_reading(wide_reading(20), {})
        sink.write_issue(collapse(20))
        await until(pilot, has(app, "1 open incident, an alarm"))
        (tmp_path / "runs" / "one").rename(tmp_path / "away")
        await until(pilot, has(app, "cannot be read now"))
        assert has(app, "1 open incident, an alarm")()
        (tmp_path / "away").rename(tmp_path / "runs" / "one")
        await until(pilot, lambda: not has(app, "cannot be read now")())
        sink.close()

    piloted(tmp_path / "runs", script)


def test_colours_and_background_are_the_terminals_own(tmp_path: Path) -> None:
    sink = store(tmp_path, (10,))
    sink.write_issue(collapse(10))
    sink.close()

    async def script(app: WatchApp, pilot: Any) -> None:
        await until(pilot, has(app, "1 open incident"))
        styles = {
            segment.style
            for strip in app.screen._compositor.render_strips()
            for segment in strip
            if segment.style is not None
        }
        colours = {each for style in styles for each in (style.color, style.bgcolor) if each}
        assert colours
        assert all(each.is_system_defined for each in colours), colours

    piloted(tmp_path, script)


LIVE = {
    "textual": "from stabmon.cli import main; main()",
    "rich": "import sys; sys.modules['textual'] = None; from stabmon.cli import main; main()",
}


@pytest.mark.parametrize("view", LIVE)
def test_both_views_live_on_a_terminal(tmp_path: Path, view: str) -> None:
    sink = store(tmp_path, (10, 20))
    sink.write_issue(collapse(20))
    sink.close()
    ours, theirs = pty.openpty()
    with interruptible(
        [sys.executable, "-c", LIVE[view], "watch", str(tmp_path), "--every", "0.2"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24", "NO_COLOR": "1"},
        start_new_session=True,
    ) as done:
        os.close(theirs)
        seen, until_ = b"", time.monotonic() + 60
        asked = False
        while done.poll() is None and time.monotonic() < until_:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    seen += os.read(ours, 65536)
                except OSError:
                    break
            if not asked and b"open incident" in seen:
                asked = True
                if view == "textual":
                    os.write(ours, b"q")
                else:
                    done.send_signal(signal.SIGINT)
        os.close(ours)
        assert done.wait(timeout=20) == 1
    assert asked
    assert b"\x1b[31m" not in seen
    assert (b"pip install" in seen) is (view == "rich")
