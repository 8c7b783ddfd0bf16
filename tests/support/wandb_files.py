"""Reader of the files of offline W&B runs."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def records(path: str) -> list[Any]:
    """Every record of a finished run's .wandb file; W&B may still be writing its end when
    ``finish`` returns.
    """
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = list(parse(Path(path).read_bytes()))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.02)
    raise TimeoutError(f"{path} has no end")


def parse(data: bytes) -> Iterator[Any]:
    """W&B's own protocol buffers in a LevelDB log: blocks of 32 KiB, behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    place, payload = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if place + 7 + length > len(data):
            return
        payload += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(payload)
            payload = b""
            yield record


def of_kind(path: str, kind: str) -> list[Any]:
    """The records of one kind: ``history``, ``metric``, ``alert``, ``config`` …"""
    return [getattr(each, kind) for each in records(path) if each.WhichOneof("record_type") == kind]


def rows(path: str) -> list[dict[str, Any]]:
    """The run's history, one dict a row."""
    return [_values(row.item) for row in of_kind(path, "history")]


def summary(path: str) -> dict[str, Any]:
    """The run's summary at its end."""
    found: dict[str, Any] = {}
    for change in of_kind(path, "summary"):
        found |= _values(change.update)
    return found


def config(path: str) -> dict[str, Any]:
    """The run's configuration at its end: that of its start and every change."""
    found: dict[str, Any] = {}
    for run in of_kind(path, "run"):
        found |= _values(run.config.update)
    for change in of_kind(path, "config"):
        found |= _values(change.update)
    return found


def panels(path: str) -> tuple[set[str], set[str]]:
    """The metrics and media of a run, and those of them that get a panel by themselves.

    W&B makes one of every name in a history or a table that is not defined as hidden; a definition
    by the full name goes before one of a group.
    """
    names = {
        name.partition("/_type")[0]
        for row in [*rows(path), {k: v for k, v in summary(path).items() if k.endswith("/_type")}]
        for name in row
        if not name.startswith("_") and (name.endswith("/_type") or not _is_media_detail(name, row))
    }
    hidden: dict[str, bool] = {}
    for metric in of_kind(path, "metric"):
        hidden[metric.name or metric.glob_name] = metric.options.hidden

    def is_hidden(name: str) -> bool:
        globs = [key for key in hidden if key.endswith("*") and name.startswith(key[:-1])]
        return hidden.get(name, hidden.get(max(globs, key=len, default=""), False))

    return names, {name for name in names if not is_hidden(name)}


def table(path: str, files: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a table as it was uploaded last."""
    newest = [row for row in [*rows(path), summary(path)] if f"{name}/path" in row][-1]
    stored = json.loads((files / newest[f"{name}/path"]).read_text())
    return [dict(zip(stored["columns"], row, strict=True)) for row in stored["data"]]


def _is_media_detail(name: str, row: dict[str, Any]) -> bool:
    return f"{name.rpartition('/')[0]}/_type" in row


def _values(items: Any) -> dict[str, Any]:
    """Names and values; what is nested has its keys joined by ``/``."""
    found: dict[str, Any] = {}
    for item in items:
        name = item.key or "/".join(item.nested_key)
        value = json.loads(item.value_json)
        if isinstance(value, dict) and "_type" in value:
            found |= {f"{name}/{key}": each for key, each in value.items()}
        else:
            found[name] = value
    return found
