"""What an environment service is sent, what its answers mean, and what its refusals do to an episode."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.agentscope.http import Busy, NoRoute, Unprocessable
from backends.sandboxes.remote.failures import told
from backends.sandboxes.remote.messages import as_text, graded, opened, stepped
from orchestrator.errors import RolloutError, SandboxError, SandboxLost, SandboxRefused, UsageError
from orchestrator.types import Failure, FailureKind


def message(content: Any = None, *calls: Any) -> bytes:
    return json.dumps({"role": "assistant", "content": content, "tool_calls": list(calls)}).encode()


def call(arguments: Any, name: Any = "ls") -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("action", "content"),
    [
        (message("hello"), "hello"),
        (message([{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}, 5]), "hello"),
        (message(None, call('{"a": true}')), '<tool_call>\n{"name": "ls", "arguments": {"a":true}}\n</tool_call>'),
        (
            message("first", call("{}"), call({"b": 1}, "cd")),
            'first\n<tool_call>\n{"name": "ls", "arguments": {}}\n</tool_call>\n'
            '<tool_call>\n{"name": "cd", "arguments": {"b":1}}\n</tool_call>',
        ),
        (message(None, call('{"a": ')), '<tool_call>\n{"name": "ls", "arguments": {"a": }\n</tool_call>'),
        (message(None, {"name": "ls"}), '<tool_call>\n{"name":"ls"}\n</tool_call>'),
        (b'{"tool_calls": "ls"}', '<tool_call>\n"ls"\n</tool_call>'),
        (b"{}", ""),
    ],
)
def test_calls_are_written_as_text_also_where_they_cannot_be_read(action: bytes, content: str) -> None:
    assert as_text(action) == {"role": "assistant", "content": content}


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_no_call_of_an_agent_s_is_refused(odd: Any) -> None:
    for action in (message(odd, odd), message(odd, call(odd, odd)), json.dumps({"tool_calls": odd}).encode()):
        assert isinstance(as_text(action)["content"], str)


@pytest.mark.parametrize("action", [b"", b"{", b"[]", b"5"])
def test_what_is_no_message_is_refused(action: bytes) -> None:
    with pytest.raises(SandboxRefused, match="not an assistant message"):
        as_text(action)


def test_answers() -> None:
    state = [{"role": "user", "content": "x", "tool_calls": []}, {"role": "user", "content": "y", "tool_calls": [1]}]
    kept = {"messages": [{"role": "user", "content": "x"}, state[1]]}
    assert orjson.loads(opened({"state": state, "info": {}}).body) == kept
    observation = stepped({"state": state, "reward": 1, "is_terminated": True, "info": {}})
    assert (orjson.loads(observation.body), observation.reward, observation.done) == (kept, 1.0, True)
    assert graded(1).reward == 1.0
    assert graded({"accuracy": 0.5, "valid": True}).reward == 0.5


@pytest.mark.parametrize(
    ("read", "answer", "kind"),
    [
        (opened, None, FailureKind.PROTOCOL),
        (opened, {"state": [5]}, FailureKind.PROTOCOL),
        (stepped, {"state": [], "reward": "1", "is_terminated": False}, FailureKind.PROTOCOL),
        (stepped, {"state": [], "reward": 0.0}, FailureKind.PROTOCOL),
        (stepped, {"state": [], "reward": float("nan"), "is_terminated": False}, FailureKind.BAD_REWARD),
        (graded, {"valid": False, "accuracy": 0.0, "error": "Evaluation failed"}, FailureKind.ENVIRONMENT),
        (graded, float("inf"), FailureKind.BAD_REWARD),
        (graded, "1.0", FailureKind.PROTOCOL),
    ],
)
def test_answers_that_make_no_sense(read: Any, answer: object, kind: FailureKind) -> None:
    with pytest.raises(SandboxError) as caught:
        read(answer)
    assert caught.value.failure.kind is kind


def sandbox_error(kind: FailureKind, message: str = "odd") -> SandboxError:
    return SandboxError(Failure(kind, "step", message))


@pytest.mark.parametrize(
    ("error", "becomes", "kind", "suspect"),
    [
        (Busy("full", None), SandboxError, FailureKind.SANDBOX_LOST, None),
        (NoRoute("none"), SandboxError, FailureKind.PROTOCOL, None),
        (Unprocessable("it ended"), SandboxLost, FailureKind.SANDBOX_LOST, True),
        (UsageError("Instance x not found!"), SandboxLost, FailureKind.SANDBOX_LOST, False),
        (UsageError("no such argument"), SandboxRefused, FailureKind.ENVIRONMENT, None),
        (sandbox_error(FailureKind.SANDBOX_LOST), SandboxLost, FailureKind.SANDBOX_LOST, False),
        (sandbox_error(FailureKind.SANDBOX_HUNG), SandboxLost, FailureKind.SANDBOX_HUNG, True),
        (sandbox_error(FailureKind.ENVIRONMENT), SandboxRefused, FailureKind.ENVIRONMENT, None),
        (sandbox_error(FailureKind.ENVIRONMENT, "ActorDiedError: x"), SandboxLost, FailureKind.SANDBOX_LOST, True),
    ],
)
def test_what_a_refusal_is_to_an_episode(
    error: UsageError | SandboxError, becomes: type[RolloutError], kind: FailureKind, suspect: bool | None
) -> None:
    judged = told(error, "step")
    assert type(judged) is becomes
    assert (judged.failure.kind, judged.failure.stage) == (kind, "step")
    assert getattr(judged, "suspect", None) is suspect
