"""Stored result of an analysis: plain values and arrays, drawn without the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stabmon._storage import strict_json
from stabmon._storage.atomic_write import replace_whole, write_text

SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class AnalysisRecord:
    """Values and arrays behind the figures and pages of one analysis.

    Attributes:
        kind: ``rollout``, ``patterns``, ``cake``, ``heatmap``, ``neurons`` or ``evolution``.
        values: numbers, strings, lists and mappings; NaN and infinities are kept.
        arrays: name -> array; arrays of one layer are named ``<content>/<layer>``.

    Example:
        >>> record = AnalysisRecord("heatmap", {"sample": 0}, {"maps/h.0": np.eye(2)})
        >>> record.arrays["maps/h.0"].shape
        (2, 2)
    """

    kind: str
    values: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


def save_record(record: AnalysisRecord, folder: str | Path) -> tuple[Path, Path]:
    """Write ``<kind>.json`` and ``<kind>.safetensors``, each in one atomic step.

    The JSON is strict: NaN and infinities follow :data:`stabmon._storage.strict_json.ENCODING`.

    Args:
        record: the record.
        folder: target folder; created if it is missing.

    Returns:
        The paths of the two files.

    Raises:
        OSError: if they cannot be written.

    Example:
        >>> import tempfile
        >>> record = AnalysisRecord("heatmap", {"n": 1}, {"maps/h.0": np.eye(2)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in save_record(record, folder)]
        ['heatmap.json', 'heatmap.safetensors']
    """
    from safetensors.numpy import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(array) for name, array in record.arrays.items()}
    numbers, text = folder / f"{record.kind}.safetensors", folder / f"{record.kind}.json"
    packed = save(arrays, metadata={"kind": record.kind})

    def write(path: Path) -> None:
        # safetensors' own writer would leave the file readable by its owner alone
        path.write_bytes(packed)

    replace_whole(numbers, write)
    head = {
        "schema_version": SCHEMA_VERSION,
        "kind": record.kind,
        "arrays": {name: list(a.shape) for name, a in arrays.items()},
    }
    write_text(text, strict_json.dumps({**head, **record.values}) + "\n")
    return text, numbers


def load_record(folder: str | Path, kind: str) -> AnalysisRecord:
    """Read a record written by :func:`save_record`.

    Args:
        folder: the folder with both files.
        kind: the record's kind, such as ``rollout``.

    Returns:
        The record.

    Raises:
        ValueError: naming the file, if one is missing, corrupt, of another kind or of a later
            version.

    Example:
        >>> import tempfile
        >>> record = AnalysisRecord("heatmap", {"n": 1}, {"maps/h.0": np.eye(2)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_record(record, folder)
        ...     load_record(folder, "heatmap").arrays["maps/h.0"].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    text, numbers = Path(folder) / f"{kind}.json", Path(folder) / f"{kind}.safetensors"
    try:
        values = strict_json.loads(text.read_text())
    except OSError as error:
        raise ValueError(
            f"{text}: {error.strerror or error}; give a folder written by stabmon analyze --kind "
            f"{kind}"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{text}: not a valid record ({error}); run stabmon analyze --kind {kind} again"
        ) from None
    version = values.pop("schema_version", None)
    if not isinstance(version, int) or version > SCHEMA_VERSION or values.pop("kind", None) != kind:
        raise ValueError(
            f"{text}: not a {kind} record of schema_version {SCHEMA_VERSION} or earlier; update "
            f"stabmon or run stabmon analyze --kind {kind} again"
        )
    shapes = values.pop("arrays", {})
    try:
        arrays = dict(load_file(numbers))
    except (OSError, SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{numbers}: cannot be read ({reason}); run stabmon analyze --kind {kind} again"
        ) from None
    if {name: list(array.shape) for name, array in arrays.items()} != shapes:
        raise ValueError(
            f"{numbers}: does not belong to {text.name}; run stabmon analyze --kind {kind} again"
        )
    return AnalysisRecord(kind, values, arrays)
