"""The process that every session's child is forked from: loads and warms the environment up, then only forks and reaps.

Forked by the server before that has read its configuration, and with it its token; runs no event loop and starts no
thread. Always true once it is ready: it waits for nothing but orders and dead children, so it answers at once; a child
that ended is reaped and told of; whatever a dead child leaves running becomes the zygote's own child, and is killed.
When the server ends, or stops talking, everything below the zygote is killed and the zygote ends last. Each session has
a folder of its own, and can change nothing outside it.

Orders and reports are JSON lists over a socket of datagrams in order:

    server to zygote   ["begin", {"memory_mb", "hidden", "life"}]   once
                       ["fork", number, confined]    with the child's end of a socketpair
                       ["end", number, grace_s]      the stream is closed already, where the child may end by itself
    zygote to server   ["ready", [notes]] | ["failed", text]
                       ["ended", number, status]     a wait status; -1 where it could not be forked
                       or have a folder
"""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, Final, NoReturn

import orjson

from backends.server import confine, family, folders
from backends.server.child import Child
from backends.server.environment import KeepsSecrets, Preloads

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from backends.server.environment import Environment

MAX_ORDER: Final = 64 * 1024
NOT_FORKED: Final = -1
_OOM_FIRST: Final = b"1000"


def start(load: Callable[[], Environment]) -> socket.socket:
    """Fork the zygote of this process, which must have one thread and no loop; the server's end of the line to it.

    It waits for `begin`, and then calls `load`.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    if os.fork():
        theirs.close()
        return ours
    ours.close()
    _live(load, theirs, parent)


def _live(load: Callable[[], Environment], line: socket.socket, parent: int) -> NoReturn:
    status = 1
    try:
        family.die_with_parent(parent)  # until it listens to the line, which ends with the server
        os.setsid()  # it must outlive the server's process group, to end what has left that
        _to_nothing(0)  # the end of the server's own standard input is for the server alone
        message = line.recv(MAX_ORDER)
        if message:
            _Zygote(load, line, orjson.loads(message)[1]).run()
        status = 0
    except BaseException:  # noqa: BLE001  # nothing may return into the server's code from here
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


class _Zygote:
    def __init__(self, load: Callable[[], Environment], line: socket.socket, config: dict[str, Any]) -> None:
        self._line = line
        self._memory_mb: int = config["memory_mb"]
        self._hidden: bool = config["hidden"]
        self._life: list[int] = config["life"]
        for fd in self._life:
            os.set_inheritable(fd, False)  # what preloading starts is not waited for
        self._pids: dict[int, int] = {}
        """number -> pid of a child that was not reaped yet."""
        self._numbers: dict[int, int] = {}
        self._doomed: dict[int, float] = {}
        """pid -> when it is killed."""
        self._sweeper = 0
        """The pid of the process that removes folders; 0 where there is none."""
        try:
            self._environment = _loaded(load)
            self._confinement, notes = _confinement(self._environment)
            self._folders = folders.Folders()
        except Exception as error:
            self._report("failed", f"{type(error).__name__}: {error}")
            raise
        self._wake, self._woken = os.pipe()
        self._notes = notes

    def run(self) -> None:
        """Serve until the server ends; then end everything."""
        family.adopt_orphans()
        for end in (self._wake, self._woken):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        gc.collect()
        gc.freeze()  # the collector would write to every object's page, and each child get its own copy
        family.hide(hidden=self._hidden)
        family.outlive_parent()
        try:
            self._report("ready", self._notes)
            self._serve()
        except ConnectionError:
            pass  # the server ended
        finally:
            family.end_children(self._numbers)

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._line, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(self._patience_ms())}
            if self._wake in ready:
                os.read(self._wake, 4096)
                self._reap()
            if self._line.fileno() in ready and not self._obey():
                return
            for pid in [pid for pid, when in self._doomed.items() if when <= _now()]:
                family.kill(pid)
                del self._doomed[pid]

    def _patience_ms(self) -> float | None:
        if not self._doomed:
            return None
        return max(min(self._doomed.values()) - _now(), 0.0) * 1000

    def _obey(self) -> bool:
        """Carry out an order; False where the server is gone."""
        message, channels, _, _ = socket.recv_fds(self._line, MAX_ORDER, 1)
        if not message:
            return False
        order = orjson.loads(message)
        if order[0] == "fork":
            self._fork(order[1], socket.socket(fileno=channels[0]), confined=order[2])
        elif (pid := self._pids.get(order[1])) is not None:
            self._doomed[pid] = _now() + order[2]
        return True

    def _fork(self, number: int, channel: socket.socket, *, confined: bool) -> None:
        folder: Path | None = None
        pid = -1
        try:
            folder = self._folders.make() if confined else None
            pid = self._forked(lambda: self._be_child(channel, folder))
        except OSError:
            self._report("ended", number, NOT_FORKED)
        channel.close()
        if pid > 0:
            self._pids[number] = pid
            self._numbers[pid] = number
        if folder is not None:
            self._folders.give(folder, pid)
        if pid < 0:
            self._folders.drop(pid)

    def _be_child(self, channel: socket.socket, folder: Path | None) -> None:
        family.adopt_orphans()
        os.setsid()
        if folder is not None:
            folders.settle(folder)
            self._confine(folder)
        Child(self._environment).serve(channel)

    def _forked(self, work: Callable[[], None]) -> int:
        """The pid of a fresh process that does this work and ends. Raises OSError."""
        zygote = os.getpid()
        if pid := os.fork():
            return pid
        status = 1
        try:
            family.die_with_parent(zygote)
            self._let_go()
            work()
            status = 0
        except BaseException:  # noqa: BLE001  # nothing may return into the zygote's code from here
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _let_go(self) -> None:
        """Give up what is the zygote's alone; take the bounds of a session."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._line.close()
        for fd in (self._wake, self._woken, *self._life):
            os.close(fd)
        _to_be_killed_first(hidden=self._hidden)
        if self._memory_mb:
            bound = self._memory_mb << 20
            resource.setrlimit(resource.RLIMIT_AS, (bound, bound))

    def _confine(self, folder: Path) -> None:
        if self._environment.runs_code:
            _to_nothing(1, 2)  # what the agent prints is not for the server's log, which nobody bounds
        if self._confinement is not None:
            self._confinement.enforce()
            self._confinement.close()
        if confine.version():
            confine.hold(folder)

    def _reap(self) -> None:
        """Bury the dead, and kill what they have left: it is this process's child by now."""
        while (dead := _dead_child()) is not None:
            pid, status = dead
            self._doomed.pop(pid, None)
            self._folders.drop(pid)
            if pid == self._sweeper:
                self._sweeper = 0
            if (number := self._numbers.pop(pid, None)) is not None:
                del self._pids[number]
                self._report("ended", number, status)
        strangers = [pid for pid in family.children() if pid not in self._numbers and pid != self._sweeper]
        for pid in strangers:
            family.kill(pid)
        if not strangers and not self._sweeper:
            self._sweep()

    def _sweep(self) -> None:
        """Have folders removed, now that whoever might write there is gone."""
        if left := self._folders.left():
            try:
                self._sweeper = self._forked(lambda: folders.remove_all(left))
            except OSError:
                self._folders.keep(left)  # until the next process ends

    def _report(self, *report: object) -> None:
        self._line.send(orjson.dumps(report))


def _loaded(load: Callable[[], Environment]) -> Environment:
    environment = load()
    if isinstance(environment, Preloads):
        environment.preload()
    if threading.active_count() > 1:
        raise RuntimeError(f"preload left threads running: {threading.enumerate()}")
    return environment


def _confinement(environment: Environment) -> tuple[confine.Confinement | None, list[str]]:
    """What sessions are held by, and notes for people."""
    secrets = environment.secrets() if isinstance(environment, KeepsSecrets) else []
    there = [path for path in secrets if path.exists()]
    if not confine.version():
        return None, ["no Landlock on this kernel: sessions can read the environment's secrets, and change its files"]
    return confine.Confinement(there) if there else None, []


def _dead_child() -> tuple[int, int] | None:
    """Reap one: its pid and wait status; None where all that there are live."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


def _to_nothing(*fds: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in fds:
        os.dup2(nothing, fd)
    os.close(nothing)


def _to_be_killed_first(*, hidden: bool) -> None:
    """Where memory ends, a session is to die, not the server. A hidden process may not write its own files."""
    family.hide(hidden=False)
    try:
        with open("/proc/self/oom_score_adj", "wb") as file:
            file.write(_OOM_FIRST)
    except OSError:
        pass  # not on this system
    family.hide(hidden=hidden)


def _now() -> float:
    """Seconds of a clock that no library freezes: one of those replaces `time.monotonic` wherever it is found."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)
