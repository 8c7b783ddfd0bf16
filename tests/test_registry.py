"""Names of leaves: of this package, of other packages, and for the length of a test."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stabmon.registry import Registry


@pytest.fixture
def gadgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry[str]]:
    """A kind with one module and a subpackage of its own, and three installed packages."""
    files = {
        "gadget_kind/__init__.py": "",
        "gadget_kind/lamp.py": "",
        "gadget_kind/inner/__init__.py": "raise ImportError('not a leaf')",
        "sound_gadget.py": "bell = 'ding'",
        "broken_gadget.py": "import no_such_module_at_all",
    }
    for package, target in {
        "sound-gadget": "bell = sound_gadget:bell",
        "broken-gadget": "horn = broken_gadget:horn",
        "twin-gadget": "lamp = sound_gadget:bell",
    }.items():
        folder = f"{package.replace('-', '_')}-1.0.dist-info"
        files[f"{folder}/METADATA"] = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        files[f"{folder}/entry_points.txt"] = f"[stabmon.gadgets]\n{target}\n"
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry[str]("gadget", package="gadget_kind")
    registry.register("lamp", "light")
    yield registry
    for name in [each for each in sys.modules if "gadget" in each and "test" not in each]:
        del sys.modules[name]


def test_a_package_that_cannot_be_imported_is_logged_once_and_left_out(
    gadgets: Registry[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert list(gadgets) == ["bell", "lamp"]
    assert gadgets["bell"] == "ding"
    assert caplog.text.count("broken-gadget") == 1
    with pytest.raises(ValueError, match=r"'horn' of the package broken-gadget.*no_such_mod"):
        gadgets["horn"]


def test_a_package_that_takes_a_name_is_left_out_and_the_name_stays(
    gadgets: Registry[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert gadgets["lamp"] == "light"
    assert caplog.text.count("twin-gadget") == 1


@dataclass(frozen=True)
class Made:
    """Entry that a decorator makes of a function."""

    function: Callable[[], None]


def test_an_entry_point_to_a_decorated_function_means_what_the_decorator_registered(
    gadgets: Registry[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def bell() -> None: ...

    gadgets.register("bell", Made(bell))
    folder = tmp_path / "alias_gadget-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: alias-gadget\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[stabmon.gadgets]\nchime = sound_gadget:bell\n")
    sys.modules["sound_gadget"] = SimpleNamespace(bell=bell)  # type: ignore[assignment]
    assert gadgets["bell"] == Made(bell)
    assert "sound-gadget" not in caplog.text
    with pytest.raises(ValueError, match="its decorator registers it as 'bell': name it so"):
        gadgets["chime"]


def test_only_modules_directly_in_the_package_are_imported(gadgets: Registry[str]) -> None:
    list(gadgets)
    assert "gadget_kind.lamp" in sys.modules
    assert "gadget_kind.inner" not in sys.modules


def test_a_temporary_entry_goes_also_after_an_error(gadgets: Registry[str]) -> None:
    with contextlib.suppress(KeyError), gadgets.temporarily("horn", "toot"):
        assert gadgets["horn"] == "toot"
        raise KeyError
    assert "horn" not in gadgets
    with (
        pytest.raises(ValueError, match="'lamp' is registered already"),
        gadgets.temporarily("lamp", "dark"),
    ):
        pass
    assert gadgets["lamp"] == "light"
