"""Every message to a user says stabmon, whatever the format of the handler."""

import ast
import io
import logging
from pathlib import Path

import pytest

import stabmon

PACKAGE = Path(stabmon.__file__).parent
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}


def calls(tree):
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def name_of(call):
    return ast.unparse(call.func)


SOURCES = {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def test_every_module_logs_to_the_logger_that_adds_the_name():
    loggers = {
        (str(path), ast.unparse(call.args[0]))
        for path, tree in SOURCES.items()
        for call in calls(tree)
        if name_of(call).endswith("logging.getLogger") and call.args
    }
    assert loggers
    assert {name for _, name in loggers} == {"'stabmon'"}


def test_no_module_logs_by_the_root_logger():
    wrong = [
        f"{path}:{call.lineno}"
        for path, tree in SOURCES.items()
        for call in calls(tree)
        if name_of(call) in {f"logging.{level}" for level in LEVELS}
    ]
    assert wrong == []


def test_every_python_warning_says_stabmon():
    found = [
        (str(path), ast.unparse(call.args[0]))
        for path, tree in SOURCES.items()
        for call in calls(tree)
        if name_of(call) == "warnings.warn"
    ]
    assert len(found) >= 2
    # paths of moved names begin with the package's own name
    assert [text for path, text in found if "stabmon" not in text and "_moved" not in path] == []


@pytest.mark.parametrize(
    ("message", "arguments", "expected"),
    [
        ("%s failed", ("JsonlSink",), "stabmon: JsonlSink failed"),
        ("stabmon starts with %s", ("nothing",), "stabmon starts with nothing"),
        ("%s", ("stabmon sees 1 of 2",), "stabmon sees 1 of 2"),
        ("100%", (), "stabmon: 100%"),
        ("/runs/stabmon/meta.json is unreadable", (), "stabmon: /runs/stabmon/meta.json is"),
    ],
)
def test_a_message_begins_with_the_name_once_also_where_the_format_has_none(
    message, arguments, expected
):
    logger, stream = logging.getLogger("stabmon"), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    try:
        logger.warning(message, *arguments)
    finally:
        logger.removeHandler(handler)
    assert stream.getvalue().startswith(expected)
    assert stream.getvalue().count("stabmon: ") <= 1


def test_a_format_that_does_not_fit_its_arguments_is_left_to_the_handler():
    logger = logging.getLogger("stabmon")
    record = logger.makeRecord("stabmon", logging.WARNING, "", 0, "%d of %d", ("one",), None)
    assert logger.filter(record)
