"""What hostile input is made of, and what must come of it: a correct result, or one typed error naming the place."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from fedsim.base.errors import FedsimError

T = TypeVar("T")


def cases(number: int) -> settings:
    """So many generated cases, the same in every run; ``test_count.py`` adds the numbers up."""
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # shrinking a failing case would take minutes
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def result(call: Callable[[], T], *places: str) -> T | None:
    """What ``call`` gives, or None after one error of fedsim's own: a line that names one of ``places``.

    Any other exception leaves, and so fails the test. The error's text is not shown: it might quote what is read.
    """
    try:
        return call()
    except FedsimError as error:
        text = str(error)
    assert len(text.splitlines()) == 1 and len(text) < 2000, f"{places}: the error is no short line"
    text.encode()
    assert any(place in text for place in places), f"the error names none of {places[-3:]}"
    return None


#: Bytes that parsers trip over: NUL, a byte-order mark, broken UTF-8, half a surrogate pair, nesting, numbers, tags.
SNIPPETS = (
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\xc0\x80",
    b"\xf4\x90\x80\x80",
    b'"\\ud800"',
    b"\xe2\x80\xa8",
    b"\x0b\x0c\x1b[2J\r",
    b"[" * 20_000,
    b'{"a":' * 20_000,
    b"9" * 5000,
    b"-1e999",
    b"1e999",
    b"NaN",
    b"Infinity",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b'"',
    b",",
    b"\n",
    b"\n\n",
    b"\\",
    b"<|eot_id|>",
    b"&a *a",
    b"!!python/object:os.system x",
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """``whole`` after one to three mishaps: flipped bits, an end cut off, a part lost, doubled or overwritten."""
    data = whole
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 40)))
        kind = draw(st.sampled_from(["flip", "flip", "cut", "lose", "double", "insert", "insert", "overwrite"]))
        if kind == "flip" and start < len(data):
            data = data[:start] + bytes([data[start] ^ 1 << draw(st.integers(0, 7))]) + data[start + 1 :]
        elif kind == "cut":
            data = data[:start]
        elif kind == "lose":
            data = data[:start] + data[stop:]
        elif kind == "double":
            data = data[:stop] + data[start:]
        elif kind in ("insert", "overwrite"):
            data = data[:start] + draw(st.sampled_from(SNIPPETS)) + data[stop if kind == "overwrite" else start :]
    return data


#: Any text, with lone halves of surrogate pairs and characters of all planes.
ANY_TEXT = st.text(st.characters(), max_size=30)

#: Values of the wrong kind for nearly every field.
JUNK: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([10**30, -(10**30), 10**400, 0, -1]),
        st.floats(),
        ANY_TEXT,
        st.sampled_from(["", " ", "\x00", "\ud800", "(A)", "Human:", "<|eot_id|>", "x" * 5000]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=5), inner, max_size=3),
    ),
    max_leaves=6,
)


@st.composite
def misshapen(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with junk in one place, or one place left out."""
    made = copy.deepcopy(value)
    inside, name = None, None
    here: Any = made
    while isinstance(here, dict | list) and here and (inside is None or draw(st.integers(0, 3)) > 0):
        inside, name = here, draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
        here = inside[name]
    if inside is None:
        return draw(JUNK)
    if draw(st.booleans()):
        inside[name] = draw(JUNK)
    else:
        del inside[name]
    return made


def as_json(value: Any) -> bytes:
    """``value`` as JSON, also where it is no value of JSON's (NaN); halves of surrogate pairs become escapes.

    Python writes no number of more than 4,300 digits: the junk has none.
    """
    return json.dumps(value).encode()
