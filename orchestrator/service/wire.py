"""`GET /wire`: our own wire over one WebSocket; the service plays the sandbox, and many sandboxes stand behind it.

Owns one client's sessions. Always true: a session runs one call at a time, in the order of `seq`; every call but CLOSE
is answered, within `call_s`; when the connection ends all its sessions do, and while it lives none is idle; what waits
for a call or for the client to read is bounded in count and bytes: a client that asks for more is not read from. Each
session is a driven episode, so the client never sees a lost sandbox behind it: an action that ends every sandbox it is
tried in is told as the loss of its own session. Solutions are never given.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import orjson

from backends.agentscope.shapes import tools_of
from backends.server.wire import MAX_FRAME, PROTOCOL, Call, ErrorCode, Hello, Op, Status, WireError, decode_calls
from orchestrator.driven import DrivenEpisode
from orchestrator.errors import ActionKilled, SandboxRefused, UnknownName, UsageError
from orchestrator.service.refusals import refusal
from orchestrator.service.replies import Replies
from orchestrator.types import EpisodeSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aiohttp import web

    from orchestrator.service.hall import Hall
    from orchestrator.service.limits import ServiceLimits
    from orchestrator.service.tenants import Admission, Place, Tenant
    from orchestrator.types import Observation

MAX_PENDING: Final = 8192
"""Calls of a connection that may wait for an answer before no more is read."""
MAX_HELD: Final = 2 * MAX_FRAME
"""Bytes of their bodies, likewise."""
LISTS: Final = 4
"""Lists of tasks that are asked for at once."""


class _Session:
    """One session of a client: its calls in order, and the task that works through them."""

    __slots__ = ("calls", "episode", "place", "seq", "task")

    def __init__(self) -> None:
        self.calls: deque[Call] = deque()
        self.seq = 0
        self.task: asyncio.Task[None] | None = None
        self.episode: DrivenEpisode | None = None
        self.place: Place | None = None

    def weigh(self) -> None:
        """Have its record counted."""
        if self.place is not None and self.episode is not None:
            self.place.weigh(self.episode.size)

    def end(self) -> None:
        """Forget it. Idempotent."""
        if self.task is not None:
            self.task.cancel()
        if self.episode is not None:
            self.episode.close()
        if self.place is not None:
            self.place.give_back()


class WireConnection:
    """One client's connection; `run` serves it until it ends."""

    def __init__(
        self,
        socket: web.WebSocketResponse,
        tenant: Tenant,
        hall: Hall,
        admission: Admission,
        limits: ServiceLimits,
        *,
        hang_up: Callable[[], None],
    ) -> None:
        self._socket = socket
        self._tenant = tenant
        self._hall = hall
        self._admission = admission
        self._limits = limits
        self._sessions: dict[int, _Session] = {}
        self._lists: set[asyncio.Task[None]] = set()
        self._listing = asyncio.Semaphore(LISTS)
        self._announced: set[str] = set()
        self._pending = 0
        self._held = 0
        self._eased = asyncio.Event()
        self._replies = Replies(socket, hang_up=hang_up, eased=self._eased.set)

    @property
    def unsent(self) -> int:
        """Bytes that its client has asked for and not read."""
        return self._replies.unsent

    async def run(self) -> None:
        """Say hello, then serve. Cancelled: every session is ended."""
        sender = asyncio.create_task(self._replies.send(), name=f"wire-replies-{self._tenant.name}")
        try:
            await self._socket.send_str(orjson.dumps(self._hello()._asdict()).decode())
            async for message in self._socket:
                if message.type != aiohttp.WSMsgType.BINARY:
                    raise WireError(f"a {message.type.name} message, not a binary frame")
                for call in decode_calls(message.data):
                    self._take(call)
                while self._pending > MAX_PENDING or self._held > MAX_HELD or self._replies.full:
                    self._eased.clear()
                    await self._eased.wait()
        except WireError as error:
            await self._socket.close(code=aiohttp.WSCloseCode.PROTOCOL_ERROR, message=str(error).encode()[:120])
        except ConnectionError:
            pass  # the client has gone: nobody is left to be told
        finally:
            await self._end(sender)

    async def close(self) -> None:
        """Hang up; `run` ends."""
        await self._socket.close(code=aiohttp.WSCloseCode.GOING_AWAY, message=b"the service is ending")

    async def _end(self, sender: asyncio.Task[None]) -> None:
        tasks = {sender, *self._lists}
        tasks |= {session.task for session in self._sessions.values() if session.task is not None}
        for session in self._sessions.values():
            session.end()
        self._sessions.clear()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    def _hello(self) -> Hello:
        info = self._hall.info
        assert info is not None, "a hall that serves has an environment"
        return Hello(
            protocol=PROTOCOL,
            token="",
            environment=info.name,
            digest=info.digest,
            isolation=info.isolation,
            deterministic=info.deterministic,
            runs_code=info.runs_code,
            max_turns=info.max_turns,
            pid=0,
        )

    def _take(self, call: Call) -> None:
        """Begin a call, or queue it behind its session's others."""
        if call.op == Op.CLOSE:
            session = self._sessions.pop(call.session, None)
            if session is not None:
                for waiting in session.calls:  # nobody waits for them any more
                    self._let_go(waiting)
                session.end()
            return
        if call.op == Op.PING:
            self._replies.add(call.id, Status.OK, 0.0, False, b"{}")
            return
        if call.op == Op.SOLUTION:
            self._replies.error(call.id, ErrorCode.FORBIDDEN, "a service gives no solutions")
            return
        self._pending += 1
        self._held += len(call.body)
        if call.op == Op.TASKS:
            task = asyncio.create_task(self._list(call), name=f"wire-tasks-{call.id}")
            self._lists.add(task)
            task.add_done_callback(self._lists.discard)
            return
        session = self._sessions.get(call.session)
        if session is None:
            if call.op != Op.OPEN:
                self._let_go(call)
                self._replies.error(call.id, ErrorCode.UNKNOWN_SESSION, f"session {call.session} is not open")
                return
            session = self._sessions[call.session] = _Session()
        session.calls.append(call)
        if session.task is None:
            session.task = asyncio.create_task(self._work(call.session, session), name=f"wire-session-{call.session}")

    async def _work(self, number: int, session: _Session) -> None:
        """A session's waiting calls, one by one."""
        while session.calls:
            call = session.calls[0]
            if self._replies.full:
                await self._replies.room()
            await self._answered(call, self._perform(session, call))
            session.calls.popleft()
            self._let_go(call)
        session.task = None
        if session.episode is None:  # it was not opened
            self._sessions.pop(number, None)
            session.end()

    async def _perform(self, session: _Session, call: Call) -> None:
        if call.seq != session.seq:
            message = f"call {call.seq} of session {call.session}, not {session.seq}"
            self._replies.error(call.id, ErrorCode.OUT_OF_ORDER, message)
            return
        session.seq += 1
        if call.op == Op.OPEN:
            self._observed(call.id, await self._open(session, _object(call.body)), session)
            return
        episode = session.episode
        if episode is None:
            self._replies.error(call.id, ErrorCode.UNKNOWN_SESSION, f"session {call.session} is not open")
        elif call.op == Op.STEP:
            self._admission.step()
            observation = await episode.step(call.body)
            session.weigh()
            self._replies.add(call.id, Status.OK, observation.reward, observation.done, observation.body)
        elif call.op == Op.EVALUATE:
            grade = await episode.evaluate(_object(call.body) or None)
            self._replies.add(call.id, Status.OK, grade.reward, True, grade.details)
        else:
            self._replies.error(call.id, ErrorCode.BAD_REQUEST, f"unknown operation {call.op}")

    async def _open(self, session: _Session, body: dict[str, Any]) -> Observation:
        if session.episode is not None:
            raise UsageError("the session is open already")
        match body:
            case {"task": str(task), "seed": int(seed), "options": dict(options)}:
                spec = EpisodeSpec(task, seed, self._step_s(body.get("step_timeout_s")), options)
            case _:
                raise UsageError("open needs a task (text), a seed (integer), options (object)")
        session.place = self._admission.instance(self._tenant)
        session.episode = await DrivenEpisode.open(self._hall, spec)
        session.weigh()
        assert session.episode.first is not None, "an opened episode has an observation"
        return session.episode.first

    def _step_s(self, wanted: object) -> float:
        """A step's limit: what the client wants, as far as the service allows it."""
        most = self._limits.step_s
        return min(float(wanted), most) if isinstance(wanted, int | float) and 0 < wanted < most else most

    async def _list(self, call: Call) -> None:
        async with self._listing:  # a list is long: few at a time are in memory
            if self._replies.full:
                await self._replies.room()
            await self._answered(call, self._listed(call))
        self._let_go(call)

    async def _listed(self, call: Call) -> None:
        tasks = await self._hall.tasks(str(_object(call.body).get("split", "")))
        left = {name: {"count": count, "needs": needs} for name, (count, needs) in tasks.left_out.items()}
        body = orjson.dumps({"tasks": list(tasks.ids), "left_out": left})
        self._replies.add(call.id, Status.OK, 0.0, False, body)

    async def _answered(self, call: Call, performing: Coroutine[None, None, None]) -> None:
        """The one place where a failure becomes an error on the wire."""
        try:
            async with asyncio.timeout(self._limits.call_s):
                await performing
        except ActionKilled as killed:
            self._replies.error(call.id, ErrorCode.STEP_TIMEOUT, killed.failure.message)
        except SandboxRefused as refused:
            self._replies.error(call.id, refused.code, refused.failure.message, retryable=refused.failure.retryable)
        except UnknownName as error:
            self._replies.error(call.id, ErrorCode.UNKNOWN_SPLIT, str(error))
        except UsageError as error:
            self._replies.error(call.id, ErrorCode.BAD_REQUEST, str(error))
        except Exception as error:  # noqa: BLE001  # a session's failure is its own; the others live on
            told = refusal(error)
            busy = told.retry_after is not None
            self._replies.error(call.id, ErrorCode.BUSY if busy else ErrorCode.ENVIRONMENT, str(told), retryable=busy)

    def _observed(self, call: int, observation: Observation, session: _Session) -> None:
        """An opening's answer, behind the tool set that it names."""
        digest = tools_of(observation.body)
        if digest is not None and digest not in self._announced and session.episode is not None:
            self._announced.add(digest)
            toolset = session.episode.toolset(digest)
            self._replies.add(0, Status.TOOLSET, 0.0, False, digest.encode() + b"\n" + toolset)
        self._replies.add(call, Status.OK, observation.reward, observation.done, observation.body)

    def _let_go(self, call: Call) -> None:
        self._pending -= 1
        self._held -= len(call.body)


def _object(body: bytes) -> dict[str, Any]:
    """A request's body as a JSON object; empty means {}. Raises UsageError."""
    try:
        value = orjson.loads(body) if body else {}
    except orjson.JSONDecodeError as error:
        raise UsageError(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError("the body is not a JSON object")
    return value
