"""What driver and shards say to each other: whatever is said is heard, whatever is malformed is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.shards.messages import (
    End,
    Fatal,
    FrameError,
    Held,
    Launch,
    Message,
    NotPlayed,
    Played,
    Ready,
    Settled,
    Standing,
    Tools,
    decode,
    encode,
)
from orchestrator.types import EpisodeKey, Failure, FailureKind, Outcome, StopReason, Trajectory

text = st.text(max_size=20)
count = st.integers(0, 2**40)
seconds = st.floats(0, 1e9)
keys = st.builds(EpisodeKey, text, count, count)
failures = st.builds(Failure, st.sampled_from(FailureKind), text, text, st.booleans())
trajectories = st.builds(
    Trajectory, key=keys, attempt=count, outcome=st.sampled_from(Outcome), stop_reason=st.sampled_from(StopReason),
    reward=st.none() | st.floats(allow_nan=False, allow_infinity=False), steps=count, buffer=st.binary(max_size=50),
    incarnations=count, model_calls=count, prompt_tokens=count, completion_tokens=count,
    failure=st.none() | failures, details=st.binary(max_size=20), started=seconds, finished=seconds,
)  # fmt: skip
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(Launch, keys, count, st.binary(max_size=50)),
    st.builds(Settled, st.lists(keys, max_size=4)),
    st.builds(End, st.booleans()),
    st.builds(Held, keys, count, st.binary(max_size=50)),
    st.builds(Ready, text),
    st.builds(Played, trajectories),
    st.builds(NotPlayed, keys, count, failures, st.binary(max_size=50)),
    st.builds(Tools, text, st.binary(max_size=50)),
    st.builds(Standing, count, seconds, seconds),
    st.builds(Fatal, text, st.booleans()),
)


@given(st.lists(messages, max_size=8))
def test_what_is_said_is_heard(said: list[Message]) -> None:
    assert decode(encode(said)) == said


@given(st.lists(messages, min_size=1, max_size=3), st.data())
def test_a_frame_that_is_cut_or_grows_is_refused(said: list[Message], data: st.DataObject) -> None:
    frame = encode(said)
    with pytest.raises(FrameError):
        decode(frame[: data.draw(st.integers(0, len(frame) - 1))])
    with pytest.raises(FrameError):
        decode(frame + b"x")


@given(st.binary(max_size=200))
def test_noise_is_refused_or_says_nothing(noise: bytes) -> None:
    try:
        assert decode(noise) == []
    except FrameError:
        pass
