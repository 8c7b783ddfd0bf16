"""See attention go wrong during transformer training, before the loss shows it, and put it right.

Names are loaded when they are first used, so that importing stabmon loads neither torch nor any
part that a run does not need.

>>> import stabmon, torch
>>> monitor = stabmon.AttentionStabilityMonitor(torch.nn.Linear(2, 2), sinks=[])
>>> monitor.close()
"""

import logging as _logging
from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec

from stabmon._moved import install as _install_moved_paths

_install_moved_paths()


class _Named(_logging.Filter):
    """Begin every message of the logger ``stabmon`` with its name.

    A handler's format may leave the name out, and training logs have many authors.
    """

    def filter(self, record: _logging.LogRecord) -> bool:
        try:
            text = record.getMessage()
        except Exception:  # a format that does not fit is for the handler to report
            text = ""
        if not text.startswith("stabmon"):
            record.msg = f"stabmon: {record.msg}"
        return True


_logger = _logging.getLogger("stabmon")
if not any(type(each).__name__ == "_Named" for each in _logger.filters):  # as after a reload
    _logger.addFilter(_Named())

_HOMES = {
    "AttentionAnalyzer": "stabmon.engine.analyzer",
    "AttentionCall": "stabmon.records",
    "AttentionStabilityMonitor": "stabmon.engine.monitor",
    "Diagnosis": "stabmon.diagnosis",
    "NonFinite": "stabmon.records",
    "Reading": "stabmon.records",
    "StabilityConfig": "stabmon.config",
    "StabilityIssue": "stabmon.records",
    "check_attention_stability": "stabmon.check",
    "load_config": "stabmon.config",
    "read_records": "stabmon.sinks.reader",
}
"""Public name -> its module; ``__init__.pyi`` declares the same for type checkers."""
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    """Load a public name or a sub-package when it is first used."""
    if name == "__version__":
        found: object = _installed_version()
    elif name in _HOMES:
        found = getattr(_import_module(_HOMES[name]), name)
    elif not name.startswith("_") and _find_spec(f"{__name__}.{name}") is not None:
        found = _import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def _installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # half of what an import cost

    try:
        return version("stabmon")
    except PackageNotFoundError:  # a source tree on the path
        return "0+unknown"


def __dir__() -> list[str]:
    """List what is loaded and what can be."""
    return sorted({*globals(), *_HOMES, "__version__"})
