"""Damage to stored values, as a failing disk, another program or an attacker leaves it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

NAMES = (
    "<script>alert(1)</script>",
    "\x1b[2J\x1b[31mred\x07",
    "]]>--><!--",
    "a\x00b\r\nc",
    "\u202egnp.exe",
    "'\"`${7*7}{{7*7}}",
    "x" * 5000,
    "../../etc/passwd",
    "/dev/zero",
    "\ud800",
    "",
)
"""Text that breaks out of pages and terminals that take it as it stands."""


def hostile(random_: random.Random) -> Any:
    """Return a value that no field expects."""
    return random_.choice(
        [
            None,
            True,
            -1,
            0,
            10**9,
            2**63,
            10**400,
            -1e308,
            1e-320,
            float("nan"),
            float("inf"),
            [],
            {},
            [[]],
            [1, [2, [3]]],
            {"": {"": {}}},
            {"__class__": "os.system"},
            [None] * 3,
            ["1", 2],
            list(range(1000)),
            *(random_.choice(NAMES) for _ in range(6)),
        ]
    )


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a value, to a depth of 30."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in entries:
        yield (*path, key)
        if isinstance(each, (dict, list)) and len(path) < 30:
            yield from places(each, (*path, key))


def damaged(value: Any, random_: random.Random) -> Any:
    """Return a copy of plain values with one to three kinds of damage in them."""
    found = copy.deepcopy(value)
    for _ in range(random_.randint(1, 3)):
        all_places = list(places(found))
        if not all_places:
            break
        *path, last = random_.choice(all_places)
        holder = found
        for key in path:
            holder = holder[key]
        _damage(holder, last, random_)
    return found


def _damage(holder: Any, last: Any, random_: random.Random) -> None:
    kind = random_.choice(["value", "value", "value", "remove", "rename", "deep", "swap"])
    if kind == "remove":
        del holder[last]
    elif kind == "rename" and isinstance(holder, dict):
        holder[random_.choice(NAMES)] = holder.pop(last)
    elif kind == "deep":
        deep: Any = 1
        for _ in range(random_.choice([50, 900])):
            deep = [deep] if random_.random() < 0.5 else {"a": deep}
        holder[last] = deep
    elif kind == "swap":
        other = random_.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[last], holder[other] = holder[other], holder[last]
    else:
        holder[last] = hostile(random_)


def damaged_line(line: str, random_: random.Random) -> bytes:
    """Return the bytes of a JSON line after damage to its values, or to its bytes."""
    kind = random_.random()
    if kind < 0.75:
        return dumped(damaged(json.loads(line), random_))
    raw = line.encode()
    return random_.choice(BYTES)(raw, random_)


def dumped(value: Any) -> bytes:
    """Return a value as JSON, also where its numbers have no JSON form."""
    return json.dumps(value).encode()


def _cut(raw: bytes, random_: random.Random) -> bytes:
    return raw[: random_.randrange(len(raw))]


def _flipped(raw: bytes, random_: random.Random) -> bytes:
    at = random_.randrange(len(raw))
    return raw[:at] + bytes([random_.randrange(256)]) + raw[at + 1 :]


def _nested(raw: bytes, random_: random.Random) -> bytes:
    return raw[:-1] + b', "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def _zeroed(raw: bytes, random_: random.Random) -> bytes:
    at = random_.randrange(len(raw))
    return raw[:at] + bytes(len(raw) - at)


def _digits(raw: bytes, random_: random.Random) -> bytes:
    return raw.replace(b'"step": ', b'"step": ' + b"9" * 6000, 1)


def _other(raw: bytes, random_: random.Random) -> bytes:
    return random_.choice([b"", b"null", b"[]", b'"text"', b"\xff\xfe", b"{}", b"{" * 50, b"NaN"])


BYTES: list[Callable[[bytes, random.Random], bytes]] = [
    _cut,
    _flipped,
    _nested,
    _zeroed,
    _digits,
    _other,
]
