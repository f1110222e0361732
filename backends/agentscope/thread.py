"""The event loop of all blocking boxes: one thread a process, from the first box's first call to the last one's end.

Owns the thread, its loop and the desks that are open on it. Always true: a process has at most one that takes desks in;
it ends when its last desk is closed, or when the interpreter does, and closes what is open before that; after a fork
the child has none, and touches nothing of its parent's. Boxes may be used from any number of threads.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, TypeVar

from orchestrator.errors import RolloutError, RunFailed, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from backends.agentscope.desk import Desk

T = TypeVar("T")

JOIN_S: Final = 30.0
"""How long the end of the interpreter waits for sandboxes to end."""

log = logging.getLogger(__name__)


class LoopThread(threading.Thread):
    """See the module's docstring. Take it with `take`."""

    def __init__(self) -> None:
        super().__init__(name="training-boxes", daemon=True)  # it ends in `_finish`, after the program's own threads
        self.pid = os.getpid()
        self._desks: set[Desk] = set()
        self._began = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Event | None = None

    @classmethod
    def take(cls, desk: Desk) -> LoopThread:
        """The process's loop thread, with the desk on it; started where there is none. Raises RunFailed."""
        with _state.lock:
            thread = _state.thread
            if thread is None:
                thread = cls()
                thread.start()
                thread._began.wait()
                if thread._loop is None:
                    raise RunFailed("an event loop for boxes could not be started; see the error of its thread")
                _state.thread = thread
            thread._desks.add(desk)
            return thread

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the loop and wait for it; an interrupt of the caller cancels it."""
        if self._loop is None or threading.get_ident() == self.ident:
            work.close()
            raise UsageError("a blocking box cannot be used on its own event loop: use the Async class")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise UsageError("the box was closed while it was used") from None
        except BaseException:
            future.cancel()
            raise

    def give_back(self, desk: Desk) -> None:
        """Close a desk, and wait until it is; with the last one the thread ends too."""
        self.do(self._close(desk))
        if self._end is not None and self._end.is_set():
            self.join()

    def abandon(self, desk: Desk) -> None:
        """The same without waiting, from anywhere: a garbage collection may come in the middle of anything."""
        if self._loop is None or self.pid != os.getpid():
            return
        try:
            self._loop.call_soon_threadsafe(self._close_later, desk)
        except RuntimeError:
            pass  # the loop has ended, and closed the desk before

    def finish(self) -> None:
        """Close every desk and end, within JOIN_S."""
        if self._loop is not None and self._end is not None:
            self._loop.call_soon_threadsafe(self._end.set)
            self.join(JOIN_S)

    def run(self) -> None:
        """The thread itself."""
        try:
            asyncio.run(self._serve())
        finally:
            self._began.set()

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self._loop.set_default_executor(_Executor())
        self._began.set()
        await self._end.wait()
        async with asyncio.TaskGroup() as tasks:
            for desk in list(self._desks):
                tasks.create_task(self._close(desk))

    def _close_later(self, desk: Desk) -> None:
        task = asyncio.get_running_loop().create_task(self._close(desk), name="close-abandoned-box")
        _state.closing.add(task)
        task.add_done_callback(_state.closing.discard)

    async def _close(self, desk: Desk) -> None:
        if desk not in self._desks:
            return
        try:
            await desk.close()
        except RolloutError as error:  # what it stood for is the server's to release, by its own time limit
            log.warning("a box could not be released: %s", error)
        finally:
            with _state.lock:
                self._desks.discard(desk)
                if not self._desks and self._end is not None:
                    self._end.set()
                    if _state.thread is self:
                        _state.thread = None


class _Executor(ThreadPoolExecutor):
    """Helper threads, as long as there may be any: at the interpreter's end, what is left to do is done at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError:
            done: Future[Any] = Future()
            done.set_result(fn(*args, **kwargs))
            return done


class _State:
    """What the module knows of its process. A child of a fork gets a new one; the old one is kept, and left alone."""

    def __init__(self, inherited: _State | None = None) -> None:
        self.lock = threading.Lock()
        self.thread: LoopThread | None = None
        self.closing: set[asyncio.Task[None]] = set()
        self.inherited = inherited


_state = _State()


def _after_fork() -> None:
    global _state
    _state = _State(_state)


def _finish() -> None:
    if (thread := _state.thread) is not None:
        thread.finish()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_finish)
