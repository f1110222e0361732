"""The fake model endpoint: recorded answers, its log, its faults, its life as a process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from bench.answers import LoggedCall, digest, load_answers, read_log, repeated, write_answers
from bench.endpoint import endpoint_process
from bench.endpoint_server import Endpoint, EndpointOptions

ASK = {"role": "user", "content": "list"}
CALL = {
    "role": "assistant",
    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "ls", "arguments": "{}"}}],
}
DONE = {"role": "assistant", "content": "done"}


def told(content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "c", "content": content}


async def post(session: aiohttp.ClientSession, url: str, *messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": messages, **fields}
    async with session.post(f"{url}/chat/completions", json=body) as response:
        answer: dict[str, Any] = {"status": response.status, "headers": response.headers}
        try:
            answer.update(orjson.loads(await response.read()))
        except (orjson.JSONDecodeError, ValueError):
            answer["malformed"] = True
        return answer


class TestAnswers:
    def test_conversations_with_one_opening_part_by_their_results(self, tmp_path: Path) -> None:
        file = tmp_path / "answers.jsonl"
        other = {"role": "assistant", "content": "empty"}
        assert write_answers(file, [[ASK, CALL, told("a"), DONE], [ASK, CALL, told(""), other]]) == 3
        answers = load_answers(file)
        assert orjson.loads(answers[digest([ASK])].message) == CALL
        assert answers[digest([ASK])].finish_reason == "tool_calls"
        assert orjson.loads(answers[digest([ASK, CALL, told("")])].message) == other

    def test_two_answers_to_one_conversation(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"equal up to message 1 .* begin with .*list"):
            write_answers(tmp_path / "answers.jsonl", [[ASK, DONE], [ASK, CALL]])

    def test_null_fields_and_key_order_do_not_count(self) -> None:
        assert digest([{"content": None, **CALL}]) == digest([CALL]) != digest([DONE])
        assert digest([{"content": "list", "role": "user"}]) == digest([ASK])

    def test_repeats_are_excused_around_a_kill(self) -> None:
        first, again = LoggedCall(10.0, "d", 0, 1), LoggedCall(20.0, "d", 0, 1)
        other_seed = LoggedCall(21.0, "d", 0, 2)
        assert repeated([first, again, other_seed], []) == [again]
        assert repeated([first, again], [10.1]) == []
        assert repeated([first, again], [10.3]) == [again]
        assert repeated([first, again, again], [10.1]) == [again]
        in_flight = first._replace(asked=9.5)
        assert repeated([in_flight, again], [9.6]) == []
        assert repeated([in_flight, again], [9.4]) == [again]


async def test_recorded_answers_over_http(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    await asyncio.to_thread(write_answers, file, [[ASK, CALL, told("a"), DONE]])
    async with Endpoint(EndpointOptions(answers=file)) as endpoint, aiohttp.ClientSession() as session:
        first = await post(session, endpoint.url, ASK)
        assert first["choices"] == [{"index": 0, "message": CALL, "finish_reason": "tool_calls"}]
        assert first["usage"] == (await post(session, endpoint.url, ASK))["usage"]
        last = await post(session, endpoint.url, ASK, {**CALL, "content": None}, told("a"))
        assert last["choices"][0]["message"] == DONE
        unknown = await post(session, endpoint.url, told("b"))
        assert unknown["status"] == 400
        assert "no recorded answer" in unknown["error"]["message"]
        async with session.get(f"{endpoint.url}/models") as response:
            assert (await response.json())["object"] == "list"
        assert endpoint.statistics()[:2] == (4, 3)


async def test_latency_and_jitter() -> None:
    options = EndpointOptions(latency_s=0.1, jitter_s=0.05)
    async with Endpoint(options) as endpoint, aiohttp.ClientSession() as session:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(post(session, endpoint.url, ASK))
        assert 0.1 < time.perf_counter() - began < 1.0


async def outcomes(options: EndpointOptions, calls: int) -> list[str]:
    seen = []
    async with Endpoint(options) as endpoint, aiohttp.ClientSession() as session:
        for _ in range(calls):
            try:
                async with asyncio.timeout(0.1):
                    answer = await post(session, endpoint.url, ASK)
                usable = answer.get("choices") and answer["choices"][0].get("message")
                seen.append(str(answer["status"]) if answer["status"] != 200 or usable else "malformed")
                if answer["status"] == 429:
                    assert answer["headers"]["Retry-After"] == "0.5"
            except TimeoutError:
                seen.append("hung")
        counts = endpoint.statistics()
        assert counts.failed == seen.count("500") + seen.count("429")
        assert counts.hung == seen.count("hung")
        assert counts.malformed == seen.count("malformed")
        assert counts.answered == seen.count("200")
    return seen


async def test_faults_are_seeded() -> None:
    options = EndpointOptions(fail_rate=0.3, hang_rate=0.05, malformed_rate=0.3, retry_after_s=0.5, seed=4)
    seen = await outcomes(options, 60)
    assert set(seen) == {"200", "500", "429", "hung", "malformed"}
    assert await outcomes(options, 60) == seen


async def test_a_hung_call_ends_with_its_client() -> None:
    arrived = asyncio.Event()
    async with (
        Endpoint(EndpointOptions(hang_rate=1.0), lambda asked, index: arrived.set()) as endpoint,
        aiohttp.ClientSession() as session,
        asyncio.timeout(5),
    ):
        call = asyncio.create_task(post(session, endpoint.url, ASK))
        await arrived.wait()
        assert endpoint.statistics().active == 1
        call.cancel()
        await endpoint.idle()
        assert endpoint.statistics()[:4] == (1, 0, 0, 1)


async def test_a_process_with_a_log(tmp_path: Path) -> None:
    log = tmp_path / "calls.jsonl"
    began = time.time()
    async with endpoint_process(EndpointOptions(log=log)) as endpoint, aiohttp.ClientSession() as session:
        assert endpoint.url.startswith("http://127.0.0.1:")
        await post(session, endpoint.url, ASK, seed=3)
        await post(session, endpoint.url, ASK, DONE, ASK)
    calls = await asyncio.to_thread(read_log, log)
    assert [call[1:4] for call in calls] == [(digest([ASK]), 0, 3), (digest([ASK, DONE, ASK]), 1, None)]
    assert began <= calls[0].asked <= calls[0].t <= calls[1].asked <= calls[1].t <= time.time()
    assert not _alive(endpoint.pid)


async def test_a_process_on_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "model.sock"
    async with endpoint_process(EndpointOptions(socket=path)) as endpoint:
        assert endpoint.url == f"unix:{path}"
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
            assert (await post(session, "http://localhost/v1", ASK))["status"] == 200


async def test_a_process_that_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended before it listened"):
        async with endpoint_process(EndpointOptions(answers=tmp_path / "missing")):
            pass


def test_it_dies_with_its_parent_when_asked() -> None:
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'bench.endpoint', '--die-with-parent'],"
        " stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert _alive(pid)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while _alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
