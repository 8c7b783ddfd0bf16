"""Proof, before any long work, that its results can be written."""

from __future__ import annotations

import tempfile
from pathlib import Path


def prove_folder(path: str, option: str) -> None:
    """Prove that files can be written into a folder, which may have to be made.

    Args:
        path: the folder.
        option: the option that names it, for the message.

    Raises:
        ValueError: if they cannot.

    Example:
        >>> prove_folder("/dev/null/results", "--out")
        Traceback (most recent call last):
        ValueError: --out /dev/null/results: /dev/null is a file; name a folder
    """
    whole = Path(path).absolute()
    existing = next(each for each in (whole, *whole.parents) if _exists(each))
    if not existing.is_dir():
        raise ValueError(f"{option} {path}: {existing} is a file; name a folder")
    _write_into(existing, f"{option} {path}", "name another folder")


def prove_file(path: str, option: str, suffixes: tuple[str, ...] = ()) -> None:
    """Prove that a file can be written.

    Args:
        path: the file.
        option: the option that names it, for the message.
        suffixes: allowed ends of its name, without dots; empty for any.

    Raises:
        ValueError: if it cannot.

    Example:
        >>> prove_file("/dev/report.md/x", "--markdown")
        Traceback (most recent call last):
        ValueError: --markdown /dev/report.md/x: no folder /dev/report.md; make it or name another
        >>> prove_file("region.txt", "--plot", ("pdf", "png"))
        Traceback (most recent call last):
        ValueError: --plot region.txt: cannot be drawn as .txt; name a file ending in pdf, png
    """
    whole = Path(path).absolute()
    named = f"{option} {path}"
    suffix = whole.suffix.lower().removeprefix(".")
    if suffixes and suffix and suffix not in suffixes:
        ends = ", ".join(suffixes)
        raise ValueError(f"{named}: cannot be drawn as .{suffix}; name a file ending in {ends}")
    if whole.is_dir():
        raise ValueError(f"{named}: is a folder; name a file in it")
    if not whole.parent.is_dir():
        raise ValueError(f"{named}: no folder {whole.parent}; make it or name another")
    if not whole.exists():
        _write_into(whole.parent, named, "name a file that can be written")
        return
    try:
        whole.open("ab").close()
    except OSError as error:
        raise _refusal(named, error, "name a file that can be written") from None


def _write_into(folder: Path, named: str, mend: str) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _refusal(named, error, mend) from None


def _refusal(named: str, error: OSError, mend: str) -> ValueError:
    return ValueError(f"{named}: cannot be written ({error.strerror or error}); {mend}")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # below a file, or a folder that cannot be entered
        return False
