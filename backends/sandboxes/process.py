"""A sandbox server as a process of this machine: how it is started, told what it needs, ended and described.

Owns nothing: whoever spawns a process kills it with its group and waits for it. The command line never carries a
secret; the token goes through standard input, which stays open for as long as the owner lives: its end ends the server.
"""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import astuple, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import orjson

from backends.environments.catalog import stage
from backends.environments.data import VARIABLE as DATA
from orchestrator.errors import SandboxError, UsageError
from orchestrator.rundir import Owner
from orchestrator.types import Failure, FailureKind, RunId

if TYPE_CHECKING:
    from collections.abc import Mapping

    from backends.environments.catalog import EnvironmentSpec
    from backends.sandboxes.tail import Tail

_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Program:
    """What a server of an environment runs: its interpreter, the staged code, its registered data."""

    environment: str
    interpreter: Path
    staged: Path
    data: Path | None
    isolation: str = "shared"

    @classmethod
    def of(cls, spec: EnvironmentSpec) -> Program:
        """Stage an installed environment. Raises Unavailable where it is not installed. Reads files."""
        return cls(spec.name, spec.interpreter(), stage(spec), spec.data_folder, spec.isolation)

    @property
    def digest(self) -> str:
        """The environment's content digest."""
        return self.staged.name

    async def spawn(
        self,
        folder: Path,
        run: RunId,
        log: BinaryIO,
        config: Mapping[str, Any],
        *,
        solutions: bool,
        tail: Tail | None = None,
    ) -> asyncio.subprocess.Process:
        """Start a server that works in `folder`, which exists. Raises SandboxError.

        `config` is what it reads from its standard input, see `backends.server.__main__`; the digest is added.
        `tail` is given to it, or given up.
        """
        arguments = ["-s", "-m", "backends.server", "--environment", self.environment]
        arguments += ["--run", run, "--owner", _owner()]
        arguments += ["--isolation", self.isolation]
        if solutions:
            arguments.append("--with-solutions")
        try:
            process = await asyncio.create_subprocess_exec(
                str(self.interpreter),
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=folder,
                env=self._variables(folder),
                start_new_session=True,  # a terminal's Ctrl-C is for the orchestrator alone
                pass_fds=() if tail is None else (tail.end,),
            )
        except OSError as error:
            raise SandboxError(Failure(FailureKind.SANDBOX_START, "start", str(error))) from error
        finally:
            if tail is not None:
                tail.given()
        if process.stdin is None:
            raise UsageError("the server has no standard input")
        life = {} if tail is None else {"life": tail.end}
        process.stdin.write(orjson.dumps({**config, **life, "digest": self.digest}) + b"\n")
        return process

    def _variables(self, folder: Path) -> dict[str, str]:
        return {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "LANG": "C.UTF-8",
            "TZ": "UTC",
            "PYTHONPATH": str(self.staged),
            "PYTHONHASHSEED": "0",  # the order of sets must not differ between servers: replay compares bytes
            **({DATA: str(self.data)} if self.data else {}),
        }


async def end_of(process: asyncio.subprocess.Process) -> int:
    """The exit status; what the server had forked goes with it, however it died."""
    code = await process.wait()
    kill(process.pid)
    return code


def kill_group(process: asyncio.subprocess.Process) -> None:
    """SIGKILL to the server's process group; gone already is success."""
    if process.returncode is None:
        kill(process.pid)


def kill(leader: int) -> None:
    """SIGKILL to a process group; gone already is success."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass


def labelled(run: RunId) -> list[int]:
    """Process ids of this machine's servers that were started for a run; what one has forked looks like it, and goes
    with it."""
    return sorted(_owners(run))


def left_behind(run: RunId) -> list[int]:
    """Those whose owner is dead. Labels alone do not tell: several processes may work for what they call the same."""
    return sorted(pid for pid, owner in _owners(run).items() if not owner.alive())


def _owners(run: RunId) -> dict[int, Owner]:
    """pid -> who started it, as the server's command line says."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        given = dict(pairwise(words)) if b"backends.server" in words else {}
        if given.get(b"--run") == run.encode():
            found[int(path.parent.name)] = _read_owner(given.get(b"--owner", b"").decode())
    return {pid: owner for pid, owner in found.items() if len(found) == 1 or _parent(pid) not in found}


def _owner() -> str:
    """This process, as one word of a command line."""
    return ":".join(map(str, astuple(Owner.current())))


def _read_owner(word: str) -> Owner:
    match word.split(":"):
        case [boot, pid, start] if pid.isdecimal() and start.isdecimal():
            return Owner(boot, int(pid), int(start))
        case _:
            return Owner("", 0, 0)


def describe(code: int) -> str:
    """An exit status in words."""
    if code == -signal.SIGALRM:
        return "the server's own timer ended it: a step ran over its time limit"
    if code < 0:
        return f"the server died of {signal.Signals(-code).name}"
    return f"the server exited with code {code}"


def death(code: int) -> Failure:
    """What an exit status means for those who had calls under way."""
    kind = FailureKind.SANDBOX_HUNG if code == -signal.SIGALRM else FailureKind.SANDBOX_LOST
    return Failure(kind, "call", describe(code))


def cpu_of(pid: int) -> float:
    """User + system seconds of a live process and its waited-for children; 0 when it is gone."""
    return sum(int(field) for field in _stat(pid)[11:15]) / _TICKS


def cpu_below(pid: int) -> float:
    """The same of all descendants that live now."""
    return sum(cpu_of(child) + cpu_below(child) for child in children_of(pid))


def children_of(pid: int) -> list[int]:
    """The children of a process's first thread that live now."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
    except OSError:
        return []


def _parent(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name; none where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
