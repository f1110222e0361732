"""The conformance kit of environments: what an environment promises to recovery, to graders and to policies.

    async def test_my_environment():
        await check_environment(lambda: LocalBackend("mine"), "mine:train")

It plays `tasks` tasks of a split, evenly spread over it, on real sandboxes: opening follows from task and seed; equal
actions give equal bytes on another sandbox and among other sessions; the known solution, where there is one, ends the
episode with the reward `solved`; whatever an agent says is answered by an observation; grading changes nothing;
closing frees. Raises ConformanceError with the first promise that is broken.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson

from orchestrator.errors import SandboxRefused, Unavailable, UnknownName
from orchestrator.testing.harness import LIMIT_S, entered, require, run_check, spec, steps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from orchestrator.protocols import Backend, Sandbox
    from orchestrator.testing.harness import MakeBackend
    from orchestrator.types import Evaluation, Observation

JUNK_CONTENTS: Final = (
    "",
    " ",
    "\x00",
    "hello",
    "</tool_call>",
    "<tool_call>{",
    "\u202e\U0001f9e8\ud7ff",
    "x" * 100_000,
)
CROWD: Final = 400
"""Sessions opened at once, and closed, to see that closing frees them."""
SMALL_CROWD: Final = 16
"""The same where a sandbox bounds its sessions, as each has a process of its own."""
ROUNDS: Final = 6
FLOOR_MIB: Final = 12.0
"""Growth that is never held against a sandbox: its collector and allocator keep some of what was freed."""


async def check_environment(
    make_backend: MakeBackend,
    split: str = "",
    *,
    tasks: int = 8,
    solved: float | None = 1.0,
    limit_s: float = LIMIT_S,
) -> None:
    """Check an environment against its contract; `solved` is the reward of a known solution, None for any.
    `limit_s` bounds the whole in seconds: an environment that is slow to start needs more.

    `make_backend()` gives a fresh backend of the environment, not entered. Raises ConformanceError.
    """

    async def check(make: MakeBackend) -> None:
        async with entered(make, with_solutions=True) as backend:
            chosen = await _tasks(backend, split, tasks)
            sandboxes = await backend.create(), await backend.create()
            for task in chosen:
                await _opening(*sandboxes, task)
                actions = await _solution(sandboxes[0], task)
                await _solved(sandboxes[0], task, actions, solved)
                await _grading(sandboxes[0], task, actions)
                await _junk(sandboxes[0], task)
            await _same_bytes(*sandboxes, chosen)
            await _frees(sandboxes[0], chosen[0], CROWD if backend.limits.sessions is None else SMALL_CROWD)

    await run_check(check, make_backend, limit_s=limit_s)


def junk() -> list[bytes]:
    """Actions that no good agent sends: not JSON, not a message, of wrong types, empty, huge, odd text."""
    calls: list[Any] = [
        5, "x", [], [None], [{}], [[]], {"function": "x"},
        [{"id": "c", "type": "function"}],
        [{"id": "c", "type": "function", "function": None}],
        [{"id": "c", "type": "function", "function": {"name": 5, "arguments": "{}"}}],
        [{"id": "c", "type": "function", "function": {"name": "ls", "arguments": None}}],
        [{"id": "c", "type": "function", "function": {"name": "ls", "arguments": "{"}}],
        [{"id": "c", "type": "function", "function": {"name": "ls", "arguments": "[1]"}}],
        [{"id": 7, "type": 7, "function": {"name": "ls", "arguments": "{}"}}],
        [{"id": "c", "type": "function", "function": {"name": "__import__('os').system", "arguments": "{}"}}],
        [{"id": "c", "type": "function", "function": {"name": "no such function", "arguments": '{"a": 1}'}}] * 100,
    ]  # fmt: skip
    bodies: list[Any] = [None, 5, "x", [], [[]], {}, {"role": "user"}, {"role": "assistant", "content": 5}]
    bodies += [{"role": "assistant", "content": content} for content in JUNK_CONTENTS]
    bodies += [{"role": "assistant", "content": None, "tool_calls": value} for value in calls]
    raw = [b"", b"{", b"\xff\xfe", b"\x00", b"NaN", b'{"role":"assistant","content":"\\ud800"}', b"[" * 5000]
    return [*raw, *map(orjson.dumps, bodies)]


async def _tasks(backend: Backend, split: str, count: int) -> list[str]:
    first, second = await backend.create(), await backend.create()
    listed = await first.tasks(split)
    require(len(listed.ids) > 0, "a split has tasks")
    require(len(set(listed.ids)) == len(listed.ids), "a split names each task once")
    require(listed == await second.tasks(split), "a split has the same tasks in the same order on every sandbox")
    if split and ":" not in split:
        await _parts(first, split, listed.ids)
    for sandbox in (first, second):
        await backend.destroy(sandbox.id)
    stride = max(1, len(listed.ids) // count)
    return list(listed.ids[::stride][:count])


async def _parts(sandbox: Sandbox, split: str, whole: Sequence[str]) -> None:
    """Train and val, where the split has them, share it out in the data's order."""
    try:
        train, val = [(await sandbox.tasks(f"{split}:{part}")).ids for part in ("train", "val")]
    except (UnknownName, Unavailable):
        return
    require(not set(train) & set(val), "train and val share no task")
    require([task for task in whole if task in set(train)] == list(train), "train is in the data's order")
    require([task for task in whole if task in set(val)] == list(val), "val is in the data's order")
    require(len(train) + len(val) == len(whole), "every task is in train or in val")


async def _opening(first: Sandbox, second: Sandbox, task: str) -> None:
    seen = []
    for sandbox, seed in ((first, 11), (first, 11), (second, 11), (second, 2**62)):
        session, observation = await sandbox.open(spec(task, seed=seed))
        _wellformed(sandbox, task, observation)
        require(not observation.done, f"{task}: an episode is not over before its first action")
        session.close()
        seen.append(observation)
    require(seen[0] == seen[1] == seen[2], f"{task}: the first observation follows from task and seed")


async def _solution(sandbox: Sandbox, task: str) -> Sequence[bytes]:
    """The known solution; one message of text where there is none."""
    try:
        return await sandbox.solution(task)
    except SandboxRefused as error:
        require(error.code in {"unknown_task", "unavailable"}, f"{task}: a missing solution is said to be missing")
        return [orjson.dumps({"role": "assistant", "content": "I do not know."})]


async def _solved(sandbox: Sandbox, task: str, actions: Sequence[bytes], solved: float | None) -> None:
    session, _ = await sandbox.open(spec(task))
    seen = await steps(session, actions)
    for observation in seen:
        _wellformed(sandbox, task, observation)
    grade = await session.evaluate()
    session.close()
    require(len(seen) == len(actions), f"{task}: the episode ends no sooner than its solution")
    if len(actions) > 0 and solved is not None:
        require(seen[-1].done, f"{task}: the solution ends the episode")
        require(
            grade.reward == solved, f"{task}: the solution is worth {solved}, not {grade.reward}: {grade.details!r}"
        )


async def _grading(sandbox: Sandbox, task: str, actions: Sequence[bytes]) -> None:
    plain, _ = await _play(sandbox, task, actions)
    session, first = await sandbox.open(spec(task))
    seen, grades = [first], [await session.evaluate()]
    for action in actions:
        seen.append(await session.step(action))
        grades.append(await session.evaluate())
        require(grades[-1] == await session.evaluate(), f"{task}: grading twice gives the same grade and details")
    session.close()
    require(seen == plain, f"{task}: grading in between changes no observation")
    for grade in grades:
        require(isinstance(orjson.loads(grade.details), dict), f"{task}: a grade's details are a JSON object")


async def _junk(sandbox: Sandbox, task: str) -> None:
    for action in junk():
        session, _ = await sandbox.open(spec(task))
        try:
            observation = await session.step(action)
        except SandboxRefused as error:
            require(False, f"{task}: the action {action[:60]!r} gets an observation, not {error.failure.message[:200]}")
            raise
        _wellformed(sandbox, task, observation)
        await session.evaluate()
        session.close()


async def _same_bytes(first: Sandbox, second: Sandbox, tasks: Sequence[str]) -> None:
    """Alone, one after the other; and all at once on the other sandbox."""
    solutions = {task: await _solution(first, task) for task in tasks}
    alone = {task: await _play(first, task, solutions[task]) for task in tasks}
    async with asyncio.TaskGroup() as group:
        plays = [(task, group.create_task(_play(second, task, solutions[task]))) for task in list(tasks) * 3]
    for task, play in plays:
        require(play.result() == alone[task], f"{task}: equal actions give equal bytes, wherever and beside whatever")


async def _frees(sandbox: Sandbox, task: str, crowd: int) -> None:
    """A sandbox that kept what is closed would grow by a crowd's size in every round."""
    pid = sandbox.statistics().pid
    empty = await asyncio.to_thread(_resident_mib, pid)
    await _crowd(sandbox, task, crowd)
    first = await asyncio.to_thread(_resident_mib, pid)
    for _ in range(ROUNDS):
        await _crowd(sandbox, task, crowd)
    require(sandbox.statistics().sessions == 0, "a closed session is not counted")
    growth = await asyncio.to_thread(_resident_mib, pid) - first
    allowed = max(FLOOR_MIB, (first - empty) * ROUNDS / 2)
    require(growth < allowed, f"{task}: closing frees a session; {ROUNDS * crowd} of them left {growth:.0f} MiB behind")


async def _crowd(sandbox: Sandbox, task: str, crowd: int) -> None:
    async with asyncio.TaskGroup() as group:
        openings = [group.create_task(sandbox.open(spec(task))) for _ in range(crowd)]
    for opening in openings:
        opening.result()[0].close()
    await sandbox.tasks("")  # answered after the closings


async def _play(sandbox: Sandbox, task: str, actions: Sequence[bytes]) -> tuple[list[Observation], Evaluation]:
    session, first = await sandbox.open(spec(task))
    seen = [first, *await steps(session, actions)]
    grade = await session.evaluate()
    session.close()
    return seen, grade


def _wellformed(sandbox: Sandbox, task: str, observation: Observation) -> None:
    """Messages with a role and text; tool sets that were announced, as lists of OpenAI functions."""
    known = {"messages", "tools", "tools_added", "new_conversation"}
    body: Any = orjson.loads(observation.body)
    fields = isinstance(body, dict) and body.keys() <= known and "messages" in body
    require(
        fields,
        f"{task}: an observation is messages, tools, tools_added and new_conversation: {observation.body[:200]!r}",
    )
    for message in body["messages"]:
        _message(task, message)
    if (digest := body.get("tools")) is not None:
        require(digest in sandbox.toolsets(), f"{task}: a tool set is announced before it is named")
        _tools(task, orjson.loads(sandbox.toolsets()[digest]))
    _tools(task, body.get("tools_added", []))


def _message(task: str, message: Mapping[str, Any]) -> None:
    known = message.get("role") in {"system", "user", "tool"} and isinstance(message.get("content"), str)
    require(known, f"{task}: an environment's message has a role (system, user, tool) and text: {message!r:.200}")


def _tools(task: str, tools: Sequence[Mapping[str, Any]]) -> None:
    for tool in tools:
        named = tool.get("type") == "function" and isinstance(tool["function"].get("name"), str)
        require(named, f"{task}: a tool is an OpenAI function with a name: {tool!r:.200}")


def _resident_mib(pid: int) -> float:
    """The resident memory of a process; 0 where it cannot be read."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0.0
    return pages * 4096 / 2**20
