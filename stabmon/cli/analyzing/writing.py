"""Write all files of an analysis, or none."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from stabmon._storage.strict_json import loads
from stabmon.analysis.record import AnalysisRecord, save_record
from stabmon.report.page import Page, encoded, for_page, render


def write_analysis(
    record: AnalysisRecord,
    page: Page,
    out: str | Path,
    form: str,
    extra: Mapping[str, str] | None = None,
) -> list[str]:
    """Write figures, page and numbers into a folder, all or nothing.

    They are made in a folder beside ``out`` and then moved. Files that an earlier analysis of the
    same kind wrote and this one does not are removed.

    Args:
        record: the record to store; the stored one names the files too.
        page: its page.
        out: the folder; made if it is missing.
        form: ``png`` or ``svg``.
        extra: more text files, name -> content.

    Returns:
        The files' names, the page first.

    Raises:
        OSError: if they cannot be written. ``out`` is then as it was.
        ValueError: if ``out`` is a file.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; give a folder")
    made = [each for each in (out, *out.parents) if not each.exists()]
    done = False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            names = _drawn(record, page, Path(scratch), form, extra or {})
            out.mkdir(exist_ok=True)
            before = _earlier(out, record.kind)
            for name in names:
                os.replace(Path(scratch) / name, out / name)
            for name in before - set(names):
                with contextlib.suppress(OSError):
                    (out / name).unlink()
        done = True
    finally:
        if not done:
            for each in made:
                with contextlib.suppress(OSError):
                    each.rmdir()
    return names


def _drawn(
    record: AnalysisRecord, page: Page, scratch: Path, form: str, extra: Mapping[str, str]
) -> list[str]:
    inside, names = {}, []
    for picture in page.pictures:
        figure = picture.draw()
        kind, data = encoded(figure, form)
        name = f"{page.kind}_{picture.name}.{form}"
        (scratch / name).write_bytes(data)
        inside[picture.name] = for_page(figure, kind, data)
        names.append(name)
    (scratch / f"{page.kind}.html").write_text(render(page, inside), encoding="utf-8")
    for name, text in extra.items():
        (scratch / name).write_text(text, encoding="utf-8")
    files = [f"{page.kind}.html", f"{page.kind}.json", f"{page.kind}.safetensors", *names, *extra]
    save_record(
        AnalysisRecord(record.kind, {**record.values, "files": files}, record.arrays), scratch
    )
    return files


def _earlier(out: Path, kind: str) -> set[str]:
    """Return the files that an earlier analysis of this kind recorded as its own."""
    try:
        files = loads((out / f"{kind}.json").read_text()).get("files", [])
    except (OSError, ValueError):
        return set()
    own = (f"{kind}_", f"{kind}.")
    return {
        name for name in files if isinstance(name, str) and name.startswith(own) and "/" not in name
    }
