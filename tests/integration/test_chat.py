"""The chat policy against a real HTTP endpoint: what it sends, what it keeps, and how it fails."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from bench.answers import write_answers
from bench.endpoint import endpoint_process
from bench.endpoint_server import Endpoint, EndpointOptions, Reply
from orchestrator.errors import PolicyError, UsageError
from orchestrator.protocols import EpisodeContext, Policy
from orchestrator.records import ConversationView, EpisodeBuffer, header
from orchestrator.types import Decision, EpisodeKey, FailureKind, Generation, Observation
from policies.agents.backoff import Backoff
from policies.agents.chat import ChatPolicy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

SECRET = "sk-not-for-your-eyes-0123456789"
TOOL = {"type": "function", "function": {"name": "ls", "parameters": {"type": "object", "properties": {}}}}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "ls", "arguments": "{}"}}],
}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "a.txt"}
DONE = {"role": "assistant", "content": "There is a.txt."}
ASK = {"role": "user", "content": "What is here?"}


class Naps:
    """Takes the place of sleep: notes the delay and goes on at once."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    async def __call__(self, delay: float) -> None:
        self.taken.append(delay)


def context(seed: int = 11) -> EpisodeContext:
    return EpisodeContext(EpisodeKey("task", 0, 0), 0, seed, None)


def a_conversation() -> tuple[EpisodeBuffer, ConversationView]:
    buffer = EpisodeBuffer(header("toy", "0" * 16))
    buffer.observe(Observation(orjson.dumps({"messages": [ASK], "tools": "set"})))
    return buffer, ConversationView(buffer, {"set": orjson.dumps([TOOL])})


def cost(decided: Decision) -> Generation:
    assert decided.generation is not None
    return decided.generation


async def act(policy: ChatPolicy) -> Decision:
    return await policy.start(context()).act(a_conversation()[1])


def completion(content: str = "hi", **choice: Any) -> Reply:
    message = {"role": "assistant", "content": content}
    return Reply(orjson.dumps({"choices": [{"message": message, "finish_reason": "stop", **choice}]}))


@asynccontextmanager
async def scripted(
    script: Callable[[dict[str, Any], int], Reply | None], options: EndpointOptions | None = None, **changes: Any
) -> AsyncIterator[tuple[ChatPolicy, Endpoint, Naps]]:
    """A policy whose sleeps are noted, and an endpoint that answers by `script`."""
    naps = Naps()
    async with (
        Endpoint(options or EndpointOptions(), script) as endpoint,
        ChatPolicy("m", endpoint.url, sleep=naps, rng=lambda: 0.5, **changes) as policy,
    ):
        yield policy, endpoint, naps


class TestConversation:
    async def test_a_whole_episode_with_tool_calls(self, tmp_path: Path) -> None:
        file = tmp_path / "answers.jsonl"
        await asyncio.to_thread(write_answers, file, [[ASK, CALL, RESULT, DONE]])
        asked: list[dict[str, Any]] = []
        async with scripted(
            lambda body, index: asked.append(body), EndpointOptions(answers=file), top_p=0.9, max_tokens=64
        ) as (policy, _, naps):
            assert isinstance(policy, Policy)
            buffer, view = a_conversation()
            agent = policy.start(context())
            first = await agent.act(view)
            buffer.decide(first)
            buffer.observe(Observation(orjson.dumps({"messages": [RESULT]})))
            last = await agent.act(view)
            assert [orjson.loads(decided.action) for decided in (first, last)] == [CALL, DONE]
            assert asked[0]["messages"] == [ASK]
            assert asked[1]["messages"] == [ASK, CALL, RESULT]
            assert asked[1]["tools"] == [TOOL]
            sampling = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 64}
            assert cost(first).sampling == {**sampling, "seed": asked[0]["seed"]}
            assert asked[0].items() >= cost(first).sampling.items()
            assert (cost(first).finish_reason, cost(first).calls) == ("tool_calls", 1)
            assert cost(first).prompt_tokens > 0
            assert cost(first).latency_s > 0
            assert naps.taken == []
            counts = policy.statistics()
            assert counts[:5] == (2, 2, 0, 0, 0)
            assert counts.prompt_tokens == cost(first).prompt_tokens + cost(last).prompt_tokens

    async def test_a_resumed_episode_asks_the_same_again(self) -> None:
        asked: list[dict[str, Any]] = []
        async with scripted(lambda body, index: asked.append(body)) as (policy, _, _):
            buffer, view = a_conversation()
            agent = policy.start(context())
            buffer.decide(await agent.act(view))
            buffer.observe(Observation(orjson.dumps({"messages": [ASK]})))
            await agent.act(view)
            restored = EpisodeBuffer.restore(bytes(buffer.data))
            again = ConversationView(restored, {"set": orjson.dumps([TOOL])})
            await policy.start(context()).act(again)
            await policy.start(context(seed=12)).act(again)
        assert asked[2] == asked[1]
        assert asked[0]["seed"] != asked[1]["seed"] != asked[3]["seed"]
        assert all(0 <= body["seed"] < 2**31 for body in asked)

    async def test_what_is_sent_can_be_chosen(self) -> None:
        asked: list[dict[str, Any]] = []
        async with scripted(
            lambda body, index: asked.append(body),
            temperature=None,
            send_seed=False,
            dialect="tool_call",
            extra={"top_k": 5},
        ) as (policy, _, _):
            decided = await act(policy)
        assert asked[0].keys() == {"model", "messages", "top_k"}
        assert asked[0]["messages"][0]["role"] == "system"
        assert cost(decided).sampling == {"top_k": 5}

    async def test_a_conversation_over_a_mebibyte(self) -> None:
        async with scripted(lambda body, index: completion(str(len(body["messages"][0]["content"])))) as (policy, *_):
            buffer = EpisodeBuffer(header("toy", "0" * 16))
            long = {"role": "user", "content": "x" * 3_000_000}
            buffer.observe(Observation(orjson.dumps({"messages": [long]})))
            decided = await policy.start(context()).act(ConversationView(buffer, {}))
        assert orjson.loads(decided.action)["content"] == "3000000"

    async def test_over_a_unix_socket(self, tmp_path: Path) -> None:
        path = tmp_path / "model.sock"
        async with (
            endpoint_process(EndpointOptions(socket=path)) as endpoint,
            ChatPolicy("m", endpoint.url) as policy,
        ):
            assert orjson.loads((await act(policy)).action)["content"] == "I am done."


class TestRetries:
    @pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 503, 529])
    async def test_what_may_pass_is_asked_again(self, status: int) -> None:
        async with scripted(lambda body, index: Reply(b"busy", status) if index < 3 else completion()) as (
            policy,
            _,
            naps,
        ):
            decided = await act(policy)
            backoff = Backoff()
            assert naps.taken == [backoff.delay(retry, 0.5) for retry in range(3)]
            assert cost(decided).calls == 4
            assert policy.statistics()[:5] == (1, 4, 3, 0, 0)

    async def test_retry_after_is_waited_out_but_bounded(self) -> None:
        replies = [Reply(b"", 429, {"Retry-After": after}) for after in ("3", "100000", "soon")]
        async with scripted(lambda body, index: replies[index] if index < 3 else completion()) as (policy, _, naps):
            await act(policy)
        backoff = Backoff()
        assert naps.taken == [3.0 + 0.25, backoff.retry_after_cap_s + 0.5, backoff.delay(2, 0.5)]

    @pytest.mark.parametrize(
        "body", [b'{"choices": [{"me', b"<html>", b'{"choices": []}', b'{"choices": [{"message": null}]}', b""]
    )
    async def test_a_reply_that_is_none_is_asked_for_again(self, body: bytes) -> None:
        async with scripted(lambda asked, index: Reply(body) if index < 1 else completion()) as (policy, *_):
            decided = await act(policy)
            assert cost(decided).calls == 2

    async def test_retries_end(self) -> None:
        async with scripted(lambda body, index: Reply(b'{"error": {"message": "melting"}}', 503), max_retries=2) as (
            policy,
            endpoint,
            naps,
        ):
            with pytest.raises(PolicyError, match=r"after 2 retries; .* 503: melting\. Check that") as caught:
                await act(policy)
            assert caught.value.failure.kind is FailureKind.MODEL_UNAVAILABLE
            assert caught.value.failure.stage == "act"
            assert len(naps.taken) == 2
            assert endpoint.statistics().requests == 3
            assert policy.statistics().failures == 1

    async def test_an_endpoint_that_is_not_there(self) -> None:
        naps = Naps()
        async with ChatPolicy("m", "http://127.0.0.1:1/v1", sleep=naps, max_retries=3) as policy:
            with pytest.raises(PolicyError, match="Cannot connect") as caught:
                await act(policy)
        assert caught.value.failure.kind is FailureKind.MODEL_UNAVAILABLE
        assert len(naps.taken) == 3

    async def test_a_silent_endpoint_runs_into_the_timeout(self) -> None:
        async with scripted(
            lambda body, index: None, EndpointOptions(hang_rate=1.0), timeout_s=0.05, max_retries=1
        ) as (policy, endpoint, _):
            with pytest.raises(PolicyError, match=r"no answer within 0\.05 s") as caught:
                await act(policy)
            assert caught.value.failure.kind is FailureKind.MODEL_UNAVAILABLE
            assert endpoint.statistics().hung == 2
            async with asyncio.timeout(5):
                await endpoint.idle()

    async def test_many_faults_at_once(self) -> None:
        options = EndpointOptions(fail_rate=0.3, malformed_rate=0.2, retry_after_s=0.1, seed=1)
        async with scripted(lambda body, index: None, options, max_retries=20) as (policy, endpoint, _):
            async with asyncio.TaskGroup() as group:
                acts = [group.create_task(act(policy)) for _ in range(100)]
            calls = [cost(done.result()).calls for done in acts]
            assert sum(calls) == policy.statistics().calls == endpoint.statistics().requests > 150
            assert endpoint.statistics().answered == 100


class TestRefusals:
    @pytest.mark.parametrize(
        ("status", "said"),
        [
            (400, "answered 400: too long"),
            (401, "answered 401: too long; put a valid key into the environment variable OPENAI_API_KEY"),
            (404, "answered 404: too long; check the base URL"),
            (422, "answered 422: too long"),
            (307, r"redirects \(307\) to /v1/chat/completions; give that"),
        ],
    )
    async def test_what_will_not_pass_fails_at_once(self, status: int, said: str) -> None:
        refusal = Reply(b'{"error": {"message": "too long"}}', status, {"Location": "/v1/chat/completions"})
        async with scripted(lambda body, index: refusal) as (policy, endpoint, naps):
            with pytest.raises(PolicyError, match=said) as caught:
                await act(policy)
            assert caught.value.failure.kind is FailureKind.POLICY
            assert naps.taken == []
            assert endpoint.statistics().requests == 1

    async def test_the_servers_words_are_bounded(self) -> None:
        async with scripted(lambda body, index: Reply(b"x" * 1_000_000, 400)) as (policy, *_):
            with pytest.raises(PolicyError) as caught:
                await act(policy)
        assert 500 < len(caught.value.failure.message) < 600

    async def test_a_reply_over_the_cap(self) -> None:
        async with scripted(lambda body, index: completion("x" * 5000), max_reply_bytes=4000, max_retries=0) as (
            policy,
            *_,
        ):
            with pytest.raises(PolicyError, match="larger than 4000 bytes"):
                await act(policy)

    async def test_a_chunked_reply_over_the_cap_is_not_read_to_its_end(self) -> None:
        closed = asyncio.Event()

        async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            try:
                while True:
                    writer.write(b"1000\r\n" + b"x" * 4096 + b"\r\n")
                    await writer.drain()
            except ConnectionError:
                closed.set()
            finally:
                writer.close()

        server = await asyncio.start_server(endless, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            async with ChatPolicy("m", f"http://127.0.0.1:{port}/v1", max_reply_bytes=50_000, max_retries=0) as policy:
                with pytest.raises(PolicyError, match="larger than 50000 bytes"):
                    await act(policy)
                async with asyncio.timeout(5):
                    await closed.wait()


class TestCancellation:
    async def test_it_closes_the_request(self) -> None:
        arrived = asyncio.Event()
        async with scripted(lambda body, index: arrived.set(), EndpointOptions(hang_rate=1.0)) as (
            policy,
            endpoint,
            _,
        ):
            call = asyncio.create_task(act(policy))
            async with asyncio.timeout(5):
                await arrived.wait()
                assert policy.statistics().in_flight == 1
                call.cancel()
                await endpoint.idle()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert policy.statistics().in_flight == 0
            assert policy.statistics().failures == 0
            assert endpoint.statistics().requests == 1

    async def test_a_cancelled_wait_for_a_retry(self) -> None:
        waiting = asyncio.Event()

        async def forever(delay: float) -> None:
            waiting.set()
            await asyncio.get_running_loop().create_future()

        async with (
            Endpoint(EndpointOptions(fail_rate=1.0)) as endpoint,
            ChatPolicy("m", endpoint.url, sleep=forever) as policy,
        ):
            call = asyncio.create_task(act(policy))
            await waiting.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert endpoint.statistics().requests == 1


class TestTheKey:
    async def test_it_is_sent_and_shown_nowhere(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("MODEL_KEY", SECRET)
        caplog.set_level(logging.DEBUG)
        echo = orjson.dumps({"error": {"message": f"wrong key {SECRET}" + "x" * 470 + SECRET}})
        replies = [Reply(echo, 401), Reply(echo, 500), Reply(echo, 200), Reply(SECRET.encode(), 307)]
        async with scripted(lambda body, index: replies[index], api_key_env="MODEL_KEY", max_retries=0) as (policy, *_):
            shown = [repr(policy), repr(policy.statistics()), repr(policy.start(context()))]
            for _ in replies:
                with pytest.raises(PolicyError) as caught:
                    await act(policy)
                assert caught.value.__cause__ is None
                assert caught.value.__context__ is None
                shown += [repr(caught.value), str(caught.value), repr(caught.value.failure)]
        assert any("[key]" in text for text in shown)
        assert not any(SECRET[:12] in text for text in [*shown, caplog.text])

    async def test_it_is_in_the_header_and_only_where_it_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[str | None] = []

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            seen.append(next((line for line in head.split("\r\n") if line.startswith("Authorization")), None))
            body = completion().body
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            writer.close()

        monkeypatch.setenv("MODEL_KEY", SECRET)
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            for name in ("MODEL_KEY", "OPENAI_API_KEY", None):
                async with ChatPolicy("m", url, api_key_env=name) as policy:
                    await act(policy)
        assert seen == [f"Authorization: Bearer {SECRET}", None, None]

    async def test_a_key_with_a_line_break_is_refused_without_being_shown(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MODEL_KEY", f"{SECRET}\n")
        with pytest.raises(UsageError, match="environment variable MODEL_KEY") as caught:
            await ChatPolicy("m", "http://127.0.0.1:1/v1", api_key_env="MODEL_KEY").__aenter__()
        assert SECRET not in str(caught.value)


class TestConnections:
    async def test_a_thousand_at_once(self) -> None:
        options = EndpointOptions(latency_s=0.5)
        async with endpoint_process(options) as endpoint, ChatPolicy("m", endpoint.url) as policy:
            async with asyncio.timeout(30), asyncio.TaskGroup() as group:
                acts = [group.create_task(act(policy)) for _ in range(1000)]
                while policy.statistics().in_flight < 1000:  # noqa: ASYNC110  the tasks' start has no event to wait for
                    await asyncio.sleep(0)
            assert all(cost(done.result()).calls == 1 for done in acts)
            assert policy.statistics()[:5] == (1000, 1000, 0, 0, 0)

    async def test_no_bound_on_connections_by_itself(self) -> None:
        arrived = asyncio.Event()

        def script(body: dict[str, Any], index: int) -> None:
            if index == 299:
                arrived.set()

        async with scripted(script, EndpointOptions(hang_rate=1.0)) as (policy, endpoint, _):
            acts = [asyncio.create_task(act(policy)) for _ in range(300)]
            async with asyncio.timeout(10):
                await arrived.wait()
                assert endpoint.statistics().active == 300
                for call in acts:
                    call.cancel()
                await endpoint.idle()
            assert policy.statistics().in_flight == 0

    async def test_a_bound_on_connections(self) -> None:
        most = 0

        def script(body: dict[str, Any], index: int) -> None:
            nonlocal most
            most = max(most, endpoint.statistics().active)

        async with scripted(script, EndpointOptions(latency_s=0.002), max_connections=4) as (policy, endpoint, _):
            async with asyncio.TaskGroup() as group:
                for _ in range(40):
                    group.create_task(act(policy))
            assert endpoint.statistics().answered == 40
        assert most == 4

    async def test_proxies_of_the_environment_are_not_trusted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        async with scripted(lambda body, index: None) as (policy, *_):
            await act(policy)
        async with scripted(lambda body, index: None, trust_env=True, max_retries=0) as (policy, *_):
            with pytest.raises(PolicyError, match="Cannot connect"):
                await act(policy)

    async def test_it_must_be_open_and_only_once(self) -> None:
        policy = ChatPolicy("m", "http://127.0.0.1:1/v1")
        with pytest.raises(UsageError, match="async with"):
            await act(policy)
        async with policy:
            with pytest.raises(UsageError, match="in use"):
                await policy.__aenter__()

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({"model": ""}, "name the model"),
            ({"base_url": "127.0.0.1:8000"}, "must be like http://"),
            ({"base_url": "ftp://host/v1"}, "must be like http://"),
            ({"base_url": "http://me:secret@host/v1"}, "no user"),
            ({"base_url": "http://host/v1?key=secret"}, "no user"),
            ({"temperature": -1.0}, "at least 0"),
            ({"timeout_s": 0}, "timeout_s is 0"),
            ({"timeout_s": float("inf")}, "timeout_s is inf"),
            ({"connect_timeout_s": -1}, "connect_timeout_s is -1"),
            ({"max_retries": -1}, "max_retries is -1"),
            ({"max_connections": -1}, "max_connections is -1"),
            ({"max_reply_bytes": 0}, "max_reply_bytes is 0"),
            ({"dialect": "latin"}, "known: openai, tool_call"),
            ({"extra": {"stream": True}}, "may not set stream"),
        ],
    )
    def test_arguments_that_make_no_sense(self, arguments: dict[str, Any], said: str) -> None:
        with pytest.raises(UsageError, match=said) as caught:
            ChatPolicy(**{"model": "m", "base_url": "http://127.0.0.1:1/v1", **arguments})
        assert "secret" not in str(caught.value)
