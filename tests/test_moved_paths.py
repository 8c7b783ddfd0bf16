"""Import paths of release 0.1.0 work, and warn once with the new path."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from stabmon._moved.table import MODULES

OLD = json.loads((Path(__file__).parent / "states" / "modules_0.json").read_text())
CHECK = """
import importlib, json, sys, warnings
old = json.load(sys.stdin)
import stabmon, stabmon.signals
failed, silent, twice = [], [], []
for name in old["modules"]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            importlib.import_module(name)
        except Exception as error:
            failed.append(f"{name}: {error!r}")
    mine = [each for each in caught if each.category is FutureWarning and f"{name} has moved" in str(each.message)]
    moved = name.removeprefix("stabmon.") in old["moved"]
    if moved and len(mine) != 1:
        silent.append(name)
    if not moved and mine:
        twice.append(name)
for module, names in old["names"].items():
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not hasattr(importlib.import_module(module), name):
                failed.append(f"{module}.{name}")
assert callable(stabmon.signals.measure)
print(json.dumps([failed, silent, twice]))
"""


@pytest.mark.long
def test_every_module_and_public_name_of_the_last_release_is_importable() -> None:
    given = json.dumps(OLD | {"moved": sorted(MODULES)})
    done = subprocess.run(
        [sys.executable, "-c", CHECK], input=given, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    failed, silent, unexpected = json.loads(done.stdout.splitlines()[-1])
    assert failed == []
    assert silent == []
    assert unexpected == []


def test_an_old_path_warns_with_the_new_one_and_gives_the_same_class() -> None:
    sys.modules.pop("stabmon.monitor", None)
    with pytest.warns(
        FutureWarning, match=r"stabmon\.monitor has moved to stabmon\.engine\.monitor"
    ):
        old = importlib.import_module("stabmon.monitor")
    from stabmon.engine.monitor import AttentionStabilityMonitor

    assert old.AttentionStabilityMonitor is AttentionStabilityMonitor


def test_no_new_module_is_in_the_table_of_old_ones() -> None:
    root = Path(importlib.import_module("stabmon").__path__[0])
    for old in MODULES:
        path = root / Path(*old.split("."))
        assert not path.with_suffix(".py").exists(), old
        assert not (path / "__init__.py").exists(), old


def test_an_unknown_module_is_still_an_import_error() -> None:
    with pytest.raises(ModuleNotFoundError, match="nothing_here"):
        importlib.import_module("stabmon.nothing_here")
