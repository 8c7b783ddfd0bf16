"""Lines at any position, against all lines of the file."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabmon.sinks.stored.line_file import LineFile

TEXTS = st.lists(st.text("ab\r", max_size=5).map(str.encode), max_size=8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lines") / "lines"


@given(TEXTS, st.binary(max_size=3).filter(lambda rest: b"\n" not in rest))
def test_after_and_before_find_every_whole_line(
    path: Path, texts: list[bytes], rest: bytes
) -> None:
    path.write_bytes(b"".join(text + b"\n" for text in texts) + rest)
    starts, at = {}, 0
    for text in texts:
        starts[at] = text + b"\n"
        at += len(text) + 1
    with LineFile(path) as file:
        assert file.end == at
        for position in range(at + len(rest) + 1):
            first = min((start for start in starts if start >= position), default=None)
            assert file.after(position) == (None if first is None else (first, starts[first]))
        for start, line in starts.items():
            assert file.before(start + len(line)) == (start, line)
        assert file.before(0) is None


@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 9)), max_size=30),
    st.integers(0, 4),
)
def test_bisection_finds_the_first_line_that_holds(
    path: Path, lines: list[tuple[int, bool, int]], wanted: int
) -> None:
    lines = sorted(lines)
    texts = [(f"{number}" if readable else "?") + "x" * extra for number, readable, extra in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    holding = [
        sum(len(text) + 1 for text in texts[:place])
        for place, (number, readable, _) in enumerate(lines)
        if readable and number >= wanted
    ]
    with LineFile(path) as file:
        found = file.first(lambda line: None if line.startswith(b"?") else int(line[:1]) >= wanted)
        assert found == (holding[0] if holding else file.end)


def test_lines_longer_than_a_block_are_whole(path: Path) -> None:
    long = b"x" * 200_000 + b"\n"
    path.write_bytes(b"a\n" + long + b"b\n")
    with LineFile(path) as file:
        assert file.after(1) == (2, long)
        assert file.before(2 + len(long)) == (2, long)
        assert file.after(2, most=10) == (2, b"x" * 10)
