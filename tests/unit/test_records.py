"""The recorded conversation: what is appended is read back, torn or damaged bytes never mislead, views are lazy."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import records
from orchestrator.errors import SandboxError, SchemaMismatch
from orchestrator.records import ConversationView, EpisodeBuffer, header, read_header
from orchestrator.types import Decision, Evaluation, FailureKind, Generation, Observation

if TYPE_CHECKING:
    from collections.abc import Sequence

HEAD = header("toy", "d" * 16)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
OBSERVATIONS = st.builds(Observation, st.binary(max_size=40), FINITE, st.booleans())
GENERATIONS = st.builds(
    Generation,
    model=st.text(max_size=4),
    prompt_tokens=st.integers(0, 1000),
    completion_tokens=st.integers(0, 1000),
    latency_s=FINITE,
    finish_reason=st.sampled_from(["stop", "length"]),
    sampling=st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=2),
    calls=st.integers(1, 4),
)
DECISIONS = st.builds(Decision, st.binary(max_size=40), st.none() | GENERATIONS)
TURNS = st.lists(st.tuples(DECISIONS, OBSERVATIONS), max_size=6)


def recorded(first: Observation, turns: Sequence[tuple[Decision, Observation]], last: Decision | None) -> EpisodeBuffer:
    buffer = EpisodeBuffer(HEAD)
    buffer.observe(first)
    for decision, observation in turns:
        buffer.decide(decision)
        buffer.observe(observation)
    if last is not None:
        buffer.decide(last)
    return buffer


def state(buffer: EpisodeBuffer) -> tuple[object, ...]:
    return (
        bytes(buffer.data), buffer.turn, buffer.last, buffer.model_calls, buffer.tokens_in, buffer.tokens_out,
        buffer.history(),
    )  # fmt: skip


@given(first=OBSERVATIONS, turns=TURNS, last=st.none() | DECISIONS)
def test_what_is_recorded_is_read_back(
    first: Observation, turns: list[tuple[Decision, Observation]], last: Decision | None
) -> None:
    buffer = recorded(first, turns, last)
    decisions = [decision for decision, _ in turns] + ([last] if last else [])
    assert buffer.history() == ([first, *[seen for _, seen in turns]], [one.action for one in decisions])
    assert buffer.turn == len(decisions)
    assert buffer.last == (turns[-1][1] if turns else first)
    generations = [one.generation for one in decisions if one.generation is not None]
    assert buffer.model_calls == sum(one.calls for one in generations)
    assert buffer.tokens_in == sum(one.prompt_tokens for one in generations)
    assert buffer.tokens_out == sum(one.completion_tokens for one in generations)
    found = [
        records.read_generation(buffer.data[record.start : record.end])
        for record in records.records(buffer.data, buffer.body_start)
        if record.kind == records.GENERATION
    ]
    assert found == generations


@given(first=OBSERVATIONS, turns=TURNS, last=st.none() | DECISIONS, reward=FINITE)
def test_restored_buffers_go_on_alike(
    first: Observation, turns: list[tuple[Decision, Observation]], last: Decision | None, reward: float
) -> None:
    buffer = recorded(first, turns, last)
    assert state(EpisodeBuffer.restore(bytes(buffer.data))) == state(buffer)
    before = state(buffer)
    buffer.grade(Evaluation(reward, b'{"why":1}'))
    assert state(EpisodeBuffer.restore(bytes(buffer.data))) == before, "what is not durable is graded again"
    *_, grade = records.records(buffer.data, buffer.body_start)
    assert grade.kind == records.EVALUATION
    assert records.read_evaluation(buffer.data, grade) == Evaluation(reward, b'{"why":1}')


@given(first=OBSERVATIONS, turns=TURNS, last=st.none() | DECISIONS, cut=st.integers(0, 2000))
def test_a_torn_tail_is_cut_to_whole_records(
    first: Observation, turns: list[tuple[Decision, Observation]], last: Decision | None, cut: int
) -> None:
    buffer = recorded(first, turns, last)
    whole = {len(HEAD)} | {record.end for record in records.records(buffer.data, buffer.body_start)}
    cut = len(HEAD) + cut % (len(buffer.data) - len(HEAD) + 1)
    restored = EpisodeBuffer.restore(bytes(buffer.data[:cut]))
    assert len(restored.data) == max(end for end in whole if end <= cut)
    assert buffer.data.startswith(restored.data)
    observations, actions = restored.history()
    assert observations == buffer.history()[0][: len(observations)]
    assert actions == buffer.history()[1][: len(actions)]
    assert restored.turn == len(actions)
    restored.observe(Observation(b"more"))
    assert restored.history()[0][-1] == Observation(b"more")


@pytest.mark.parametrize("length", range(len(HEAD)))
def test_a_cut_header_is_a_schema_mismatch(length: int) -> None:
    with pytest.raises(SchemaMismatch):
        EpisodeBuffer.restore(HEAD[:length])


@pytest.mark.parametrize(
    "bad",
    [
        b"XLOT" + HEAD[4:],
        HEAD[:4] + b"\x02\x00" + HEAD[6:],
        HEAD[:10] + b"[" + HEAD[11:],
        header("toy", "d")[:6] + b"\x02\x00\x00\x00[]",
    ],
)
def test_foreign_or_damaged_headers_are_schema_mismatches(bad: bytes) -> None:
    with pytest.raises(SchemaMismatch, match=r"schema|damaged"):
        read_header(bad)


def test_a_header_says_what_was_recorded() -> None:
    assert read_header(HEAD + b"rest") == ({"environment": "toy", "digest": "d" * 16, "dialect": "openai"}, len(HEAD))


def test_the_format_never_changes() -> None:
    """Stored runs hold these bytes: another layout needs another schema version."""
    buffer = EpisodeBuffer(header("e", "d"))
    buffer.observe(Observation(b"{}", 0.5, False))
    buffer.decide(Decision(b"[]"))
    buffer.observe(Observation(b"", 1.0, True))
    buffer.grade(Evaluation(1.0, b"{}"))
    half, one = struct.pack("<d", 0.5), struct.pack("<d", 1.0)
    text = b'{"environment":"e","digest":"d","dialect":"openai"}'
    assert bytes(buffer.data) == b"".join(
        (
            b"RLOT" + struct.pack("<HI", 1, len(text)) + text,
            b"O\x0b\0\0\0" + half + b"\0{}",
            b"A\x02\0\0\0[]",
            b"O\x09\0\0\0" + one + b"\1",
            b"E\x0a\0\0\0" + one + b"{}",
        )
    )


USER = {"role": "user", "content": "go"}
CALL: dict[str, object] = {"role": "assistant", "content": None, "tool_calls": []}
TOOL = {"role": "tool", "content": "done"}


def shown(*messages: object, **fields: object) -> Observation:
    return Observation(orjson.dumps({"messages": messages, **fields}))


class TestView:
    def test_messages_come_in_order_and_are_parsed_once(self) -> None:
        buffer = recorded(shown(USER), [(Decision(orjson.dumps(CALL)), shown(TOOL, USER))], None)
        view = ConversationView(buffer, {})
        assert view.messages() == [USER, CALL, TOOL, USER]
        first = view.messages()[0]
        buffer.decide(Decision(orjson.dumps(CALL)))
        buffer.observe(shown(TOOL))
        assert view.messages() == [USER, CALL, TOOL, USER, CALL, TOOL]
        assert view.messages()[0] is first
        assert orjson.loads(view.joined_json()) == view.messages()
        assert (view.turn, view.last) == (2, shown(TOOL))

    def test_a_new_conversation_hides_what_was_said_before_and_keeps_the_tools(self) -> None:
        first = shown(USER, tools="digest")
        anew = shown(TOOL, new_conversation=True)
        for whole in (False, True):
            buffer = recorded(first, [(Decision(orjson.dumps(CALL)), anew)], None)
            view = ConversationView(buffer, {"digest": b'[{"name":"a"}]'}, whole=whole)
            before = [USER, CALL] if whole else []
            assert view.messages() == [*before, TOOL]
            assert view.beginnings() == ([0, 2] if whole else [0])
            buffer.decide(Decision(orjson.dumps(CALL)))
            buffer.observe(shown(USER))
            assert view.messages() == [*before, TOOL, CALL, USER]
            assert orjson.loads(view.joined_json()) == view.messages()
            assert view.tools() == [{"name": "a"}]

    def test_an_action_is_joined_as_it_was_written(self) -> None:
        action = b'{ "role":"assistant",  "content":"a b" }'
        view = ConversationView(recorded(shown(USER), [(Decision(action), shown(TOOL))], None), {})
        assert action in view.joined_json()

    def test_before_anything_was_observed(self) -> None:
        view = ConversationView(EpisodeBuffer(HEAD), {})
        assert (view.turn, view.messages(), view.joined_json(), view.tools_json()) == (0, [], b"[]", b"[]")
        with pytest.raises(LookupError, match="no observation yet"):
            view.last  # noqa: B018  # a property that raises

    @pytest.mark.parametrize("added", [[], [{"name": "c"}], [{"name": "c"}, {"name": "d"}]])
    @pytest.mark.parametrize("opening", [None, [], [{"name": "a"}, {"name": "b"}]])
    def test_tools_are_the_opening_set_and_what_was_added(
        self, opening: list[object] | None, added: list[object]
    ) -> None:
        sets = {} if opening is None else {"digest": orjson.dumps(opening)}
        first = shown(USER) if opening is None else shown(USER, tools="digest")
        view = ConversationView(recorded(first, [(Decision(b"{}"), shown(TOOL, tools_added=added))], None), sets)
        assert view.tools() == [*(opening or []), *added]
        assert orjson.loads(view.tools_json()) == view.tools()

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"5", b'{"messages":[5]}', b'{"messages":[],"tools":"never"}'])
    def test_what_cannot_be_read_is_the_environments_fault(self, body: bytes) -> None:
        for name in ("messages", "joined_json", "tools", "tools_json"):
            view = ConversationView(recorded(Observation(body), [], None), {})
            with pytest.raises(SandboxError) as caught:
                getattr(view, name)()
            assert caught.value.failure.kind is FailureKind.ENVIRONMENT

    def test_odd_fields_are_passed_over(self) -> None:
        body = b'{"messages":{"a":1},"tools":7,"tools_added":"x","more":1}'
        view = ConversationView(recorded(Observation(body), [], None), {})
        assert (view.messages(), view.tools()) == ([], [])
