"""The toy in isolation `process`, with secrets and grading elsewhere, and words for what only a process can do wrong:

    daemon         leave a process behind that has left its group, its session and its parent; says its number
    children       leave a process in the group that ignores every signal it may; says its number
    bomb S         end this process S seconds from now, whatever it does then
    leave S        as bomb, by a process that was left behind and holds this one's files
    garble         write nonsense where the answers go
    tell ANSWER    write an answer of one's own (JSON of kind, reward, done, tools, body) and then do nothing
    raise TEXT     raise
    close          close the stream to the server
    global         count in a global of the module; says the count
    read PATH      say what a file holds, or why not; `~` is the secret one
    write PATH     change a file, or say why not
    shell WORDS    say what a command says
    signal PID     SIGKILL another process; `up` is the parent, `top` the server
    memory_of PID  read another process's memory
    me             say the number of this process
    where          say where the secret is
    home           say which folder is this session's own
    files          say which files are open
    state          say what holds this process: oom_score_adj, address space
    forge          export what is no state at all
    badexport      make export raise

The secret holds what a total is worth nothing without, and is read by `grade` alone. The task
`grade_hangs` makes grading hang, `grade_dies` makes it die.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import orjson
from backends.environments.forked.counting import Toy, ToySession, unknown_split

from backends.server.environment import Grade, Reply, Tasks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SECRET = Path(__file__).parent / "answers" / "truth.json"
COUNT = 0
WARMED: list[int] = []


def environment() -> Forked:
    """The entry point that the server calls."""
    return Forked()


class Forked(Toy):
    """See the module."""

    name: ClassVar[str] = "forked"
    isolation: ClassVar[str] = "process"

    def preload(self) -> None:
        """What only sessions are to see."""
        WARMED.append(os.getpid())

    def secrets(self) -> Sequence[Path]:
        """The folder of the answers."""
        return [SECRET.parent, Path("/nowhere/at/all")]

    def tasks(self, split: str) -> Tasks:
        """The toy's."""
        if WARMED:
            raise RuntimeError("the server has preloaded")
        if (split or "toy").partition(":")[0] not in {"toy", "forked", "faults"}:
            raise unknown_split(split, ["forked"])
        return super().tasks(split.replace("forked", "toy"))

    def open(self, task: str, seed: int, options: Mapping[str, Any]) -> tuple[ForkedSession, Reply]:
        """A session that knows where it runs."""
        if len(WARMED) != 1 or os.getpid() in WARMED:
            raise RuntimeError("opened elsewhere than in a child of what has preloaded")
        session, first = super().open("toy_3" if task.startswith("grade") else task, seed, options)
        return ForkedSession(session.target), first

    def grade(self, task: str, seed: int, options: Mapping[str, Any], state: bytes, params: Mapping[str, Any]) -> Grade:
        """1.0 at the target, if the secret says so."""
        if task == "grade_dies":
            os.abort()
        if task == "grade_hangs":
            time.sleep(3600)
        worth = float(orjson.loads(SECRET.read_bytes())["worth"])
        try:
            total, target, fails = orjson.loads(state)
        except (ValueError, TypeError):
            return Grade(0.0, {"state": "makes no sense"})
        if fails:
            raise RuntimeError("this session cannot be graded")
        return Grade(worth * 0.5 ** abs(target - total), {"total": total, "target": target, "params": dict(params)})


class ForkedSession(ToySession):
    """A running total, in a process of its own."""

    def __init__(self, target: int) -> None:
        super().__init__(target)
        self.forged = False
        self.export_fails = False

    def step(self, action: bytes) -> Reply:
        """The toy's words, or those of this module."""
        try:
            content = str(orjson.loads(action).get("content") or "")
        except (orjson.JSONDecodeError, AttributeError):
            content = ""
        command, _, argument = content.partition(" ")
        if command == "sleep":
            time.sleep(float(argument))
            return self._say("slept")
        if (word := getattr(self, f"do_{command}", None)) is not None:
            return self._say(str(word(argument)))
        reply = super().step(action)
        assert isinstance(reply, Reply)
        return reply

    def evaluate(self, params: Mapping[str, Any]) -> Grade:
        """Never: it is graded elsewhere."""
        raise AssertionError("graded where its actions run")

    def export(self) -> bytes:
        """The total, the target, and whether grading is to fail."""
        if self.export_fails:
            raise RuntimeError("this session cannot be exported")
        return b"nothing" if self.forged else orjson.dumps([self.total, self.target, self.grade_fails])

    def do_daemon(self, argument: str) -> int:
        read, write = os.pipe()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
                os.write(write, str(os.getpid()).encode())
                for fd in range(64):
                    try:
                        os.close(fd)
                    except OSError:
                        pass
                time.sleep(3600)
            os._exit(0)
        os.wait()
        return int(os.read(read, 20))

    def do_children(self, argument: str) -> int:
        pid = os.fork()
        if pid == 0:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            time.sleep(3600)
        return pid

    def do_bomb(self, argument: str) -> str:
        timer = threading.Timer(float(argument), os._exit, (5,))
        timer.daemon = True
        timer.start()
        return "armed"

    def do_leave(self, argument: str) -> str:
        parent = os.getpid()
        if os.fork() == 0:
            time.sleep(float(argument))
            os.kill(parent, signal.SIGKILL)
            time.sleep(3600)
        return "armed"

    def do_garble(self, argument: str) -> str:
        os.write(_stream(), b"\xff" * 4096)
        return "written"

    def do_tell(self, argument: str) -> str:
        told = orjson.loads(argument)
        tools, body = told.get("tools", "").encode(), told.get("body", "").encode()
        head = struct.pack("<BdBII", told["kind"], told.get("reward", 0.0), told.get("done", 0), len(tools), len(body))
        os.write(_stream(), head + tools + body)
        time.sleep(3600)
        return "unreachable"

    def do_raise(self, argument: str) -> str:
        raise RuntimeError(argument)

    def do_close(self, argument: str) -> str:
        os.close(_stream())
        time.sleep(3600)
        return "unreachable"

    def do_global(self, argument: str) -> int:
        global COUNT
        COUNT += 1
        return COUNT

    def do_read(self, argument: str) -> str:
        try:
            return (SECRET if argument == "~" else Path(argument)).read_text(encoding="utf-8")
        except OSError as error:
            return f"refused {error.errno}"

    def do_write(self, argument: str) -> str:
        try:
            (SECRET if argument == "~" else Path(argument)).write_text("mine", encoding="utf-8")
        except OSError as error:
            return f"refused {error.errno}"
        return "written"

    def do_shell(self, argument: str) -> str:
        done = subprocess.run(argument.replace("~", str(SECRET)), shell=True, capture_output=True, text=True)
        return done.stdout + done.stderr

    def do_signal(self, argument: str) -> str:
        try:
            os.kill(_somebody(argument), signal.SIGKILL)
        except OSError as error:
            return f"refused {error.errno}"
        return "killed"

    def do_memory_of(self, argument: str) -> str:
        try:
            Path(f"/proc/{_somebody(argument)}/mem").open("rb").close()
        except OSError as error:
            return f"refused {error.errno}"
        return "open"

    def do_me(self, argument: str) -> int:
        return os.getpid()

    def do_where(self, argument: str) -> str:
        return str(SECRET)

    def do_home(self, argument: str) -> str:
        return os.environ["HOME"]

    def do_files(self, argument: str) -> str:
        found = []
        for fd in range(256):
            try:
                mode = os.fstat(fd).st_mode
            except OSError:
                continue
            found.append(f"{fd}:{'socket' if stat.S_ISSOCK(mode) else 'pipe' if stat.S_ISFIFO(mode) else 'file'}")
        return " ".join(found)

    def do_state(self, argument: str) -> str:
        killed_first = Path("/proc/self/oom_score_adj").read_text(encoding="ascii").strip()
        return f"{killed_first} {resource.getrlimit(resource.RLIMIT_AS)[0] >> 20} {sys.flags.hash_randomization}"

    def do_forge(self, argument: str) -> str:
        self.forged = True
        return "forged"

    def do_badexport(self, argument: str) -> str:
        self.export_fails = True
        return "broken"


def _somebody(argument: str) -> int:
    if argument == "up":
        return os.getppid()
    if argument == "top":
        return int(Path(f"/proc/{os.getppid()}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[1])
    return int(argument)


def _stream() -> int:
    return next(fd for fd in range(3, 256) if _is_socket(fd))


def _is_socket(fd: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        return False
