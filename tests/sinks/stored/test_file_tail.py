"""A file that grows, shrinks, is replaced or goes away, read by its new lines."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabmon.sinks.stored.file_tail import FileTail


def new(tail: FileTail) -> list[bytes]:
    """The lines that are new, all of them where the file is another one."""
    with tail.opened() as file:
        if file is None:
            return []
        if tail.is_new(file):
            tail.move_to(file, 0)
        return [line for _, line in tail.new_lines(file)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lines"


@given(st.lists(st.binary(max_size=12), max_size=10))
def test_each_line_comes_once_however_it_is_written(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("tail") / "lines"
    tail, found = FileTail(path), []
    with path.open("ab", buffering=0) as file:
        for part in parts:
            file.write(part)
            found += new(tail)
    *lines, _rest = b"".join(parts).split(b"\n")
    assert found == [line + b"\n" for line in lines]


def test_a_file_that_is_not_there_has_no_lines_and_is_read_once_it_is(path: Path) -> None:
    tail = FileTail(path)
    assert new(tail) == []
    path.write_bytes(b"one\n")
    assert new(tail) == [b"one\n"]


def test_an_unfinished_line_that_is_cut_off_is_read_as_it_is_written_anew(path: Path) -> None:
    tail = FileTail(path)
    path.write_bytes(b"one\ntwo, never fini")
    assert new(tail) == [b"one\n"]
    os.truncate(path, 4)
    with path.open("ab") as file:
        file.write(b"three\n")
    assert new(tail) == [b"three\n"]


@pytest.mark.parametrize("text", [b"", b"new\n", b"other, and a good deal longer\nlines\n"])
def test_a_file_that_begins_anew_is_read_from_its_start(path: Path, text: bytes) -> None:
    tail = FileTail(path)
    path.write_bytes(b"one\ntwo\n")
    assert new(tail) == [b"one\n", b"two\n"]
    path.write_bytes(text)
    assert b"".join(new(tail)) == text


def test_a_longer_copy_under_the_same_name_goes_on_where_it_was(path: Path) -> None:
    tail = FileTail(path)
    path.write_bytes(b"one\ntwo\n")
    new(tail)
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes() + b"three\n")
    copy.replace(path)
    assert new(tail) == [b"three\n"]


def test_a_file_that_goes_away_and_comes_back_is_known_again(path: Path) -> None:
    tail, away = FileTail(path), path.with_suffix(".away")
    path.write_bytes(b"one\n")
    new(tail)
    path.rename(away)
    assert new(tail) == []
    with away.open("ab") as file:
        file.write(b"two\n")
    away.rename(path)
    assert new(tail) == [b"two\n"]


def test_a_look_that_fails_half_way_is_made_again(path: Path) -> None:
    tail = FileTail(path)
    path.write_bytes(b"one\n")

    def failing() -> None:
        with tail.opened():
            raise OSError("stale file handle")

    with pytest.raises(OSError, match="stale"):
        failing()
    assert new(tail) == [b"one\n"]
