"""Sessions of one environment inside a sandbox: order, time limits, size caps, and errors as data.

Owns every session of the connection. Always true: a session runs one call at a time; a call runs only in the order of
its `seq`; an answer leaves for every call but CLOSE. Synchronous steps run under an interval timer with SIGALRM at its
default action, so that C code which never returns ends the process (no thread would ever get to run); steps that wait
run as tasks under a timeout of their own. The server loop calls `handle`, and sends what `take` returns.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import signal
import sys
import time
import traceback
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Protocol

import orjson

from backends.server.environment import EnvironmentFault, Grade, Reply, bad_reward, too_large
from backends.server.wire import MAX_CALLS, MAX_FRAME, Call, ErrorCode, Op, Status

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from typing import TypeAlias

    from backends.server.environment import Session, Tasks

    Opened: TypeAlias = tuple[Session, Reply]

DEFAULT_TIMEOUT_S: Final = 60.0
MAX_REPLIES_BYTES: Final = MAX_FRAME // 2
"""Bodies of one frame together; its header fits into the rest."""
_MESSAGE_CAP: Final = 2000


class Opener(Protocol):
    """What sessions are opened on: an Environment, or `Processes` before one. See Environment."""

    def tasks(self, split: str) -> Tasks: ...

    def open(self, task: str, seed: int, options: Mapping[str, Any]) -> Opened | Awaitable[Opened]: ...

    def solution(self, task: str) -> Sequence[bytes]: ...


class _Live:
    """A session and its place in the order of calls."""

    __slots__ = ("busy", "queued", "seq", "session", "timeout_s", "waits")

    def __init__(self) -> None:
        self.session: Session | None = None
        self.seq = 0
        self.timeout_s = DEFAULT_TIMEOUT_S
        self.busy: asyncio.Task[None] | None = None
        self.waits: tuple[int, Awaitable[object] | None] = (0, None)
        """While `busy`: the number of the call that is being carried out, and what it waits for."""
        self.queued: deque[Call] = deque()


class Watchdog:
    """The interval timer around synchronous work. Re-armed only when a tenth of the limit has passed: a system call a
    batch, not a call."""

    __slots__ = ("_until",)

    def __init__(self) -> None:
        self._until = 0.0

    def arm(self, now: float, limit_s: float) -> None:
        """The process dies of SIGALRM unless `disarm` or another `arm` comes within `limit_s` seconds."""
        until = now + limit_s
        if until > self._until + limit_s * 0.1 or until < self._until:
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            self._until = until

    def disarm(self) -> None:
        """Called before anything waits."""
        if self._until:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._until = 0.0


class Sessions:
    """All sessions of one environment, and the replies that wait to be sent."""

    def __init__(self, environment: Opener, *, solutions: bool, max_body: int, wake: Callable[[], None]) -> None:
        self._environment = environment
        self._solutions = solutions
        self._max_body = max_body
        self._wake = wake
        """Called when a task, not `handle`, has produced a reply."""
        self._live: dict[int, _Live] = {}
        self._announced: set[str] = set()
        self._header: list[tuple[int, int, float, bool, int]] = []
        self._bodies: list[bytes] = []
        self._bytes = 0
        self.watchdog = Watchdog()

    def handle(self, call: Call, now: float) -> None:
        """Run a call, or queue it behind its session's running one."""
        if call.op in _SESSIONLESS:
            self.watchdog.arm(now, DEFAULT_TIMEOUT_S)
            self._guard(call, lambda: self._inquire(call))
            return
        live = self._live.get(call.session)
        if live is None:
            if call.op == Op.CLOSE:
                return
            if call.op != Op.OPEN:
                self._error(call.id, ErrorCode.UNKNOWN_SESSION, f"session {call.session} is not open")
                return
            live = self._live[call.session] = _Live()
        if live.busy is not None and call.op != Op.CLOSE:  # nobody waits for the others of a session that is closed
            live.queued.append(call)
            return
        self._run(live, call, now)

    def take(self) -> tuple[list[tuple[int, int, float, bool, int]], list[bytes]]:
        """The oldest replies, as many as fit a frame; the caller sends them, and asks again while any wait."""
        header, bodies = self._header, self._bodies
        if len(header) <= MAX_CALLS and self._bytes <= MAX_REPLIES_BYTES:
            self._header, self._bodies, self._bytes = [], [], 0
            return header, bodies
        count, size = 0, 0
        for body in bodies:
            if count == MAX_CALLS or (count and size + len(body) > MAX_REPLIES_BYTES):
                break
            count += 1
            size += len(body)
        self._header, self._bodies, self._bytes = header[count:], bodies[count:], self._bytes - size
        return header[:count], bodies[:count]

    @property
    def waiting_bytes(self) -> int:
        """Bytes of replies not yet taken."""
        return self._bytes

    @property
    def waiting(self) -> bool:
        """Whether there are replies not yet taken."""
        return bool(self._header)

    def _run(self, live: _Live, call: Call, now: float) -> None:
        if call.op == Op.CLOSE:
            self._close(call.session, live)
            return
        if call.seq != live.seq:
            self._error(call.id, ErrorCode.OUT_OF_ORDER, f"call {call.seq} of session {call.session}, not {live.seq}")
            return
        live.seq += 1
        self.watchdog.arm(now, live.timeout_s)
        self._guard(call, lambda: self._perform(live, call))

    def _guard(self, call: Call, work: Callable[[], None]) -> None:
        """The one place where an environment's exception becomes an error on the wire."""
        try:
            work()
        except EnvironmentFault as fault:
            self._error(call.id, fault.code, str(fault), retryable=fault.retryable)
        except Exception as error:  # noqa: BLE001  # an environment may raise anything; other sessions live on
            self._crash(call, error)
        if call.op == Op.OPEN:
            self._forget_unopened(call.session)

    def _forget_unopened(self, number: int) -> None:
        """A session whose opening has failed is none."""
        live = self._live.get(number)
        if live is not None and live.session is None and live.busy is None:
            del self._live[number]

    def _crash(self, call: Call, error: Exception) -> None:
        traceback.print_exception(error, limit=20, file=sys.stderr)
        self._error(call.id, ErrorCode.ENVIRONMENT, f"{type(error).__name__}: {error}")

    def _perform(self, live: _Live, call: Call) -> None:
        if call.op == Op.OPEN:
            if live.session is not None:
                raise EnvironmentFault(ErrorCode.BAD_REQUEST, f"session {call.session} is open already")
            self._open(live, call)
            return
        session = live.session
        if session is None:
            raise EnvironmentFault(ErrorCode.UNKNOWN_SESSION, f"session {call.session} is not open")
        result: Reply | Grade | Awaitable[Reply | Grade]
        if call.op == Op.STEP:
            result = session.step(call.body)
        elif call.op == Op.EVALUATE:
            result = session.evaluate(_object(call.body))
        else:
            raise EnvironmentFault(ErrorCode.BAD_REQUEST, f"unknown operation {call.op}")
        if isinstance(result, Reply | Grade):
            self._answer(call.id, result)
        elif inspect.isawaitable(result):
            self._begin(live, call, result)
        else:
            raise TypeError(f"{type(session).__name__} returned {type(result).__name__}, not a Reply or Grade")

    def _open(self, live: _Live, call: Call) -> None:
        body = _object(call.body)
        task, seed, options = body.get("task"), body.get("seed", 0), body.get("options", {})
        timeout_s = body.get("step_timeout_s", DEFAULT_TIMEOUT_S)
        if not (isinstance(task, str) and type(seed) is int and isinstance(options, dict)):
            raise EnvironmentFault(
                ErrorCode.BAD_REQUEST, "open needs a task (text), a seed (integer), options (object)"
            )
        if not (isinstance(timeout_s, float | int) and 0 < timeout_s < math.inf):
            raise EnvironmentFault(ErrorCode.BAD_REQUEST, "step_timeout_s must be a positive number of seconds")
        live.timeout_s = float(timeout_s)
        opened = self._environment.open(task, seed, options)
        if isinstance(opened, tuple):
            live.session, reply = opened
            self._answer(call.id, reply)
        else:
            self._begin(live, call, opened)

    def _inquire(self, call: Call) -> None:
        body = _object(call.body)
        if call.op == Op.PING:
            self._reply(call.id, Status.OK, 0.0, False, b"{}")
            return
        if call.op == Op.TASKS:
            tasks = self._environment.tasks(str(body.get("split", "")))
            left = {name: {"count": count, "needs": needs} for name, (count, needs) in tasks.left_out.items()}
            self._reply(call.id, Status.OK, 0.0, False, orjson.dumps({"tasks": list(tasks.ids), "left_out": left}))
            return
        if not self._solutions:
            raise EnvironmentFault(ErrorCode.FORBIDDEN, "this server was not started with --with-solutions")
        actions = self._environment.solution(str(body.get("task", "")))
        self._reply(call.id, Status.OK, 0.0, False, orjson.dumps([action.decode() for action in actions]))

    def _begin(self, live: _Live, call: Call, waiting: Awaitable[Reply | Grade | Opened]) -> None:
        live.waits = call.id, waiting
        live.busy = asyncio.create_task(self._wait(live, call, waiting), name=f"session-{call.session}")

    async def _wait(self, live: _Live, call: Call, waiting: Awaitable[Reply | Grade | Opened]) -> None:
        """Finish a call that waits, then those that queued behind it."""
        limit = asyncio.timeout(live.timeout_s)
        try:
            async with limit:
                result = await waiting
                if not isinstance(result, Reply | Grade):
                    live.session, result = result
                self._answer(call.id, result)
        except EnvironmentFault as fault:
            self._error(call.id, fault.code, str(fault), retryable=fault.retryable)
        except TimeoutError as error:
            if limit.expired():
                self._error(call.id, ErrorCode.STEP_TIMEOUT, f"a step took longer than {live.timeout_s:g} s")
            else:
                self._crash(call, error)
        except Exception as error:  # noqa: BLE001  # an environment may raise anything; other sessions live on
            self._crash(call, error)
        live.busy = None
        if call.op == Op.OPEN:
            self._forget_unopened(call.session)
        while live.queued and live.busy is None:
            self._run(live, live.queued.popleft(), time.monotonic())
        self.watchdog.disarm()
        self._wake()

    def _close(self, number: int, live: _Live) -> None:
        del self._live[number]
        if live.busy is not None:
            live.busy.cancel()
            call, waiting = live.waits
            if inspect.iscoroutine(waiting) and inspect.getcoroutinestate(waiting) == inspect.CORO_CREATED:
                waiting.close()  # its task will never begin
            for unanswered in (call, *(queued.id for queued in live.queued)):
                self._error(unanswered, ErrorCode.UNKNOWN_SESSION, f"session {number} was closed")
        if live.session is not None:
            try:
                live.session.close()
            except Exception as error:  # noqa: BLE001  # an environment may raise anything; CLOSE is not answered
                traceback.print_exception(error, limit=20, file=sys.stderr)

    def _answer(self, call: int, result: Reply | Grade) -> None:
        reward = result.reward
        if not (isinstance(reward, float | int) and math.isfinite(reward)):
            self._error(call, ErrorCode.BAD_REWARD, str(bad_reward(reward)))
            return
        if isinstance(result, Grade):
            self._reply(call, Status.OK, float(reward), True, orjson.dumps(result.details))
            return
        toolset = result.toolset
        if toolset is not None and toolset.digest not in self._announced:
            self._announced.add(toolset.digest)
            body = toolset.digest.encode() + b"\n" + toolset.body
            self._reply(0, Status.TOOLSET, 0.0, False, body)
        self._reply(call, Status.OK, float(reward), result.done, result.body)

    def _error(self, call: int, code: str, message: str, *, retryable: bool = False) -> None:
        text = (
            message[:_MESSAGE_CAP].encode("utf-8", "backslashreplace").decode()
        )  # an exception's text may hold anything
        body = orjson.dumps({"code": code, "message": text, "retryable": retryable})
        self._reply(call, Status.ERROR, 0.0, False, body)

    def _reply(self, call: int, status: int, reward: float, done: bool, body: bytes) -> None:
        if len(body) > self._max_body:
            self._error(call, ErrorCode.TOO_LARGE, str(too_large(len(body), self._max_body)))
            return
        self._header.append((call, status, reward, done, len(body)))
        self._bodies.append(body)
        self._bytes += len(body)


_SESSIONLESS: Final = frozenset({Op.TASKS, Op.SOLUTION, Op.PING})


def _object(body: bytes) -> dict[str, Any]:
    """A request's body as a JSON object; empty means {}."""
    try:
        value = orjson.loads(body) if body else {}
    except orjson.JSONDecodeError as error:
        raise EnvironmentFault(ErrorCode.BAD_REQUEST, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise EnvironmentFault(ErrorCode.BAD_REQUEST, "the body is not a JSON object")
    return value
