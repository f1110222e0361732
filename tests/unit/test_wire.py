"""The wire: what is encoded is decoded, and whatever else arrives is a WireError and nothing worse."""

from __future__ import annotations

import struct
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backends.sandboxes.listener import read_hello
from backends.server.wire import MAX_CALLS, PROTOCOL, Call, Hello, WireError, decode_answers, decode_calls, encode

SMALL = st.integers(0, 2**53)
BODIES = st.binary(max_size=64)
CALLS = st.lists(st.builds(Call, SMALL, SMALL, SMALL, SMALL, BODIES), max_size=8)
REWARDS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53)
ANSWERS = st.lists(st.tuples(SMALL, SMALL, REWARDS, st.booleans(), BODIES), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=5),
    max_leaves=12,
)
HELLO = Hello(PROTOCOL, "token", "toy", "0" * 16, "shared", True, False, 64, 1)


def framed(header: bytes, bodies: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<I", len(header) if length is None else length) + header + bodies


def frame_of(entries: list[tuple[Any, ...]]) -> bytes:
    return encode([(*entry[:-1], len(entry[-1])) for entry in entries], [entry[-1] for entry in entries])


@given(calls=CALLS)
def test_calls_come_back(calls: list[Call]) -> None:
    assert decode_calls(frame_of([tuple(call) for call in calls])) == calls


@given(answers=ANSWERS)
def test_answers_come_back(answers: list[tuple[int, int, float, bool, bytes]]) -> None:
    decoded = decode_answers(frame_of(list(answers)))
    assert decoded == answers
    assert [type(reward) for _, _, reward, _, _ in decoded] == [type(reward) for _, _, reward, _, _ in answers]


def survives(frame: bytes) -> None:
    """Both sides read it or refuse it; what they read covers the frame, and has the types it should have."""
    for decode in (decode_calls, decode_answers):
        try:
            entries: list[Any] = list(decode(frame))
        except WireError:
            continue
        (size,) = struct.unpack_from("<I", frame)
        assert 4 + size + sum(len(entry[-1]) for entry in entries) == len(frame)
        for entry in entries:
            assert isinstance(entry[-1], bytes)
            assert all(isinstance(number, int | float) for number in entry[:-1])


@given(frame=st.binary(max_size=80))
def test_any_bytes(frame: bytes) -> None:
    survives(frame)


@given(header=JSON, bodies=BODIES)
@example(header=[["abcde"]], bodies=b"")
@example(header=["abcde"], bodies=b"")
@example(header=[{"1": 1, "2": 2, "3": 3, "4": 4, "5": 5}], bodies=b"")
@example(header=[[1, 0, 0.0, False, 2**63]], bodies=b"x")
@example(header=[[1, 0, 0.0, False, 2], [2, 0, 0.0, False, -1]], bodies=b"x")
@example(header=[[1, 0, 0.0, False, True]], bodies=b"x")
@example(header=[[1, 0, 0.0, 1, 1]], bodies=b"x")
@example(header=[[1, 0, "0", False, 1]], bodies=b"x")
def test_any_json_as_header(header: object, bodies: bytes) -> None:
    survives(framed(orjson.dumps(header), bodies))


@given(answers=ANSWERS, where=st.integers(0, 400), junk=st.binary(max_size=6), cut=st.integers(0, 6))
def test_damaged_frames(answers: list[tuple[Any, ...]], where: int, junk: bytes, cut: int) -> None:
    frame = frame_of(answers)
    where %= len(frame) + 1
    survives(frame[:where] + junk + frame[where + cut :])


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x01\x00",
        framed(b"[]", length=3),
        framed(b"[]", length=2**32 - 1),
        framed(b"[]", b"more than the header says"),
        framed(b"{}"),
        framed(b"[1]"),
        framed(b"[[1,2,3,4]]"),
        framed(b"[[1,2,3,4,5,6]]", b"12345"),
        framed(b"[[1,0,0.5,false,3]]", b"ab"),
        framed(b"[[1,0,0.5,false,-3]]", b"ab"),
        framed(b"[[1,0,NaN,false,0]]"),
        framed(b"[" * 100_000),
        framed(b"[" * 5_000 + b"]" * 5_000),
        framed(b"[" + b"[1,0,0.5,false,0]," * MAX_CALLS + b"[1,0,0.5,false,0]]"),
        framed(b"\xff\xfe"),
    ],
)
def test_malformed_frames_are_refused(frame: bytes) -> None:
    for decode in (decode_calls, decode_answers):
        with pytest.raises(WireError, match=r"frame|call|reply"):
            decode(frame)


def test_as_many_calls_as_allowed() -> None:
    entry = b"[1,2,0,1,0]"
    assert len(decode_calls(framed(b"[" + b",".join([entry] * MAX_CALLS) + b"]"))) == MAX_CALLS


def test_a_hello_comes_back() -> None:
    assert read_hello(orjson.dumps(HELLO._asdict()).decode()) == HELLO


@given(text=st.text(max_size=40))
def test_any_text_as_hello(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        read_hello(text)


@given(field=st.sampled_from(Hello._fields), value=JSON)
def test_a_hello_with_one_odd_field(field: str, value: object) -> None:
    fields = HELLO._asdict() | {field: value}
    try:
        hello = read_hello(orjson.dumps(fields).decode())
    except ValueError:
        return
    assert type(getattr(hello, field)) is type(getattr(HELLO, field)) or isinstance(value, bool)


@pytest.mark.parametrize(
    "change",
    [
        {"more": 1},
        {"isolation": "none"},
        {"max_turns": 0},
        {"token": "t\u00f6ken"},
        {"environment": "x" * 5000},
        {"pid": None},
    ],
)
def test_odd_hellos_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="hello"):
        read_hello(orjson.dumps(HELLO._asdict() | change).decode())


@pytest.mark.parametrize("missing", Hello._fields)
def test_a_hello_without_a_field_is_refused(missing: str) -> None:
    fields = {name: value for name, value in HELLO._asdict().items() if name != missing}
    with pytest.raises(ValueError, match="malformed"):
        read_hello(orjson.dumps(fields).decode())
