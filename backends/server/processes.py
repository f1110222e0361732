"""The server's side of isolation `process`: sessions whose environment runs in children of a zygote.

Owns the line to the zygote and the tethers of its children. Always true: there are no more sessions than allowed; a
child is forgotten when the zygote has buried it. A child's death is its own session's loss; the zygote's is the
server's.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

import orjson

from backends.server import doubt, family
from backends.server.environment import EnvironmentFault, Grade, GradesElsewhere, Reply, Toolset
from backends.server.pipe import MAX_TOOLSET, Answer, Ask, Garbled, Told, with_head
from backends.server.tether import Tether
from backends.server.wire import MAX_CHILDREN, ErrorCode
from backends.server.zygote import MAX_ORDER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from backends.server.environment import Environment, Tasks

CLOSE_S: Final = 1.0
"""A session's `close` may take this long."""
ROOM_S: Final = 2.0
"""How long an opening waits for a child that is ending."""
BURIAL_S: Final = 20.0
"""A zygote that has not buried a killed child by then hangs."""
EXIT_CODE: Final = 70
"""Of a server that has lost its zygote."""


class Processes:
    """An environment as `Sessions` needs it, with each session in a child. Enter it inside the loop, once.

    `line` is the zygote's, which was told to begin. `lost` is called when the zygote has ended or hangs, with why.
    """

    def __init__(
        self,
        environment: Environment,
        line: socket.socket,
        *,
        max_body: int,
        max_children: int = MAX_CHILDREN,
        lost: Callable[[str], None],
    ) -> None:
        self.environment = environment
        self.max_body = max_body
        self._line = line
        self._lost = lost
        self._max_children = max_children
        self._room = asyncio.Semaphore(max_children)
        self._children: dict[int, Tether] = {}
        self._sessions: set[int] = set()
        self._burials: dict[int, asyncio.TimerHandle] = {}
        self._last = 0
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Self:
        """Wait until the zygote is ready. Raises SystemExit where the environment cannot be loaded."""
        self._line.setblocking(False)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._line, self._hear)
        try:
            await self._ready
        except BaseException:
            loop.remove_reader(self._line)
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        asyncio.get_running_loop().remove_reader(self._line)
        self._line.close()

    def tasks(self, split: str) -> Tasks:
        """See Environment."""
        return self.environment.tasks(split)

    def solution(self, task: str) -> Sequence[bytes]:
        """See Environment."""
        return self.environment.solution(task)

    async def open(self, task: str, seed: int, options: Mapping[str, Any]) -> tuple[ChildSession, Reply]:
        """A session in a child of its own. Raises EnvironmentFault. Cancelled: the child is killed."""
        spec = {"task": task, "seed": seed, "options": options, "max_body": self.max_body}
        await self._make_room()
        child = self.fork(confined=True)
        session = ChildSession(self, child, spec)
        return session, await session.open()

    async def _make_room(self) -> None:
        try:
            async with asyncio.timeout(ROOM_S):
                await self._room.acquire()
        except TimeoutError:
            message = f"{self._max_children} sessions are open, as many as this sandbox may hold: close some first"
            raise EnvironmentFault(ErrorCode.BUSY, message, retryable=True) from None

    def fork(self, *, confined: bool) -> Tether:
        """A fresh child; a confined one is a session, for which there must be room."""
        ours, theirs = socket.socketpair()
        self._last = number = self._last + 1
        try:
            socket.send_fds(self._line, [orjson.dumps(["fork", number, confined])], [theirs.fileno()])
        except OSError as error:
            self._lost(f"the zygote takes no orders: {error}")
        theirs.close()
        ours.setblocking(False)
        child = self._children[number] = Tether(number, ours, self._order_end)
        if confined:
            self._sessions.add(number)
        return child

    def _order_end(self, number: int, grace_s: float) -> None:
        try:
            self._line.send(orjson.dumps(["end", number, grace_s]))
        except OSError as error:
            self._lost(f"the zygote takes no orders: {error}")
        if number not in self._burials:
            limit, late = grace_s + BURIAL_S, "the zygote does not bury its children: it hangs"
            self._burials[number] = asyncio.get_running_loop().call_later(limit, self._lost, late)

    def _hear(self) -> None:
        """Take in the zygote's reports."""
        try:
            message = self._line.recv(MAX_ORDER)
        except OSError:
            message = b""
        if not message:
            self._lost("the zygote ended")
            return
        report: list[Any] = orjson.loads(message)
        match report:
            case ["ready", notes]:
                for note in notes:
                    print(note, file=sys.stderr, flush=True)  # noqa: T201  # the server's log is its standard error
                self._ready.set_result(None)
            case ["failed", str(text)]:
                self._ready.set_exception(SystemExit(f"the environment cannot be loaded: {text}"))
            case ["ended", int(number), int(status)]:
                self._bury(number, status)
            case _:
                self._lost(f"the zygote reports {report!r:.100}")

    def _bury(self, number: int, status: int) -> None:
        if (late := self._burials.pop(number, None)) is not None:
            late.cancel()
        if number in self._sessions:
            self._sessions.discard(number)
            self._room.release()
        self._children.pop(number).buried(status)


class ChildSession:
    """A session whose environment runs in a child. Made by `Processes.open`."""

    def __init__(self, processes: Processes, child: Tether, spec: dict[str, Any]) -> None:
        self._processes = processes
        self._child = child
        self._spec = spec
        self._tools_bytes = 0
        self._toolsets: set[str] = set()
        self._doubted = processes.environment.runs_code

    async def open(self) -> Reply:
        """The first observation; the child does not outlive a failure."""
        try:
            return self._reply(await self._ask(self._child, Ask.OPEN, Told.REPLY, orjson.dumps(self._spec)))
        except EnvironmentFault:
            self._child.end(CLOSE_S)
            raise

    async def step(self, action: bytes) -> Reply:
        """See Session. Raises EnvironmentFault. Cancelled: the child is killed."""
        answer = await self._ask(self._child, Ask.STEP, Told.REPLY, action)
        if not self._doubted:
            return self._reply(answer)
        try:
            return self._reply(doubt.believable(answer, self._toolsets))
        except Garbled as error:
            raise self._garbled(self._child, error) from None

    async def evaluate(self, params: Mapping[str, Any]) -> Grade:
        """See Session, and GradesElsewhere. Raises EnvironmentFault. Cancelled: the child is killed."""
        if not isinstance(self._processes.environment, GradesElsewhere):
            return self._grade(await self._ask(self._child, Ask.EVALUATE, Told.GRADE, orjson.dumps(params)))
        state = (await self._ask(self._child, Ask.EXPORT, Told.STATE, b"")).body
        grader = self._processes.fork(confined=False)
        try:
            question = with_head({**self._spec, "params": params}, state)
            return self._grade(await self._ask(grader, Ask.GRADE, Told.GRADE, *question))
        finally:
            grader.end(0.0)

    def close(self) -> None:
        """Let the session close itself; its process is killed if that takes long."""
        self._child.end(CLOSE_S)

    async def _ask(self, child: Tether, op: int, wanted: int, *parts: bytes) -> Answer:
        """An answer of the wanted kind."""
        try:
            answer = await child.ask(op, *parts, max_body=self._processes.max_body)
            if answer.kind == wanted:
                return answer
            if answer.kind not in {Told.FAULT, Told.CRASH}:
                raise Garbled(f"an answer of kind {answer.kind}, not {wanted}")
            fault = _fault(answer)
        except Garbled as error:
            raise self._garbled(child, error) from None
        raise self._doubt(fault, op) if self._doubted else fault

    def _doubt(self, fault: EnvironmentFault, op: int) -> EnvironmentFault:
        """The same fault, unless the agent's code may have made it."""
        if op not in {Ask.STEP, Ask.EXPORT}:
            return fault
        if op == Ask.STEP and fault.code == ErrorCode.TOO_LARGE:
            return fault  # ends the playing, and is graded
        self._child.end(0.0)
        return doubt.failure(fault)

    def _garbled(self, child: Tether, why: object) -> EnvironmentFault:
        child.end(0.0)
        return EnvironmentFault(ErrorCode.SESSION_LOST, f"the session's process broke its protocol: {why}")

    def _reply(self, answer: Answer) -> Reply:
        if not answer.toolset:
            return Reply(answer.body, answer.reward, answer.done)
        self._tools_bytes += len(answer.toolset)
        if self._tools_bytes > MAX_TOOLSET or not _is(list, answer.toolset):
            raise self._garbled(self._child, "a tool set that is no JSON array, or too many of them")
        toolset = Toolset.of(answer.toolset)
        self._toolsets.add(toolset.digest)
        return Reply(answer.body, answer.reward, answer.done, toolset)

    def _grade(self, answer: Answer) -> Grade:
        if not _is(dict, answer.body):
            raise self._garbled(self._child, "a grade whose details are no JSON object")
        return Grade(answer.reward, orjson.loads(answer.body))


def _is(kind: type, body: bytes) -> bool:
    try:
        return isinstance(orjson.loads(body), kind)
    except orjson.JSONDecodeError:
        return False


def _fault(answer: Answer) -> EnvironmentFault:
    """What the child says went wrong. Raises Garbled."""
    try:
        told = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        raise Garbled("an error that is not JSON") from None
    match told:
        case {"code": str(code), "message": str(message), "retryable": bool(retryable)}:
            return EnvironmentFault(code, message, retryable=retryable)
        case {"message": str(message), "trace": str(trace)}:
            print(trace, file=sys.stderr, flush=True)  # noqa: T201  # the server's log is its standard error
            return EnvironmentFault(ErrorCode.ENVIRONMENT, message)
        case _:
            raise Garbled("an error without a message")


def give_up(why: str) -> NoReturn:
    """End the server, whose zygote is lost, and all that is below it."""
    print(f"{why}; the server ends", file=sys.stderr, flush=True)  # noqa: T201  # the server's log is its standard error
    family.end_children()
    os._exit(EXIT_CODE)
