"""A sandbox server as a process of this machine: how it is started, told what it needs, ended and described.

Owns nothing: whoever spawns a process kills it with its group and waits for it. The command line never carries a
secret; the token goes through standard input, which stays open for as long as the owner lives: its end ends the server.
"""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import orjson

from backends.environments.catalog import stage
from backends.environments.data import VARIABLE as DATA
from orchestrator.errors import SandboxError, UsageError
from orchestrator.types import Failure, FailureKind, RunId

if TYPE_CHECKING:
    from collections.abc import Mapping

    from backends.environments.catalog import EnvironmentSpec

_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Program:
    """What a server of an environment runs: its interpreter, the staged code, its registered data."""

    environment: str
    interpreter: Path
    staged: Path
    data: Path | None

    @classmethod
    def of(cls, spec: EnvironmentSpec) -> Program:
        """Stage an installed environment. Raises Unavailable where it is not installed. Reads files."""
        return cls(spec.name, spec.interpreter(), stage(spec), spec.data_folder)

    @property
    def digest(self) -> str:
        """The environment's content digest."""
        return self.staged.name

    async def spawn(
        self, folder: Path, run: RunId, log: BinaryIO, config: Mapping[str, Any], *, solutions: bool
    ) -> asyncio.subprocess.Process:
        """Start a server that works in `folder`, which exists. Raises SandboxError.

        `config` is what it reads from its standard input, see `backends.server.__main__`; the digest is added.
        """
        arguments = ["-s", "-m", "backends.server", "--environment", self.environment, "--run", run]
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
            )
        except OSError as error:
            raise SandboxError(Failure(FailureKind.SANDBOX_START, "start", str(error))) from error
        if process.stdin is None:
            raise UsageError("the server has no standard input")
        process.stdin.write(orjson.dumps({**config, "digest": self.digest}) + b"\n")
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
    """Process ids of this machine's servers that were started for a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if b"backends.server" in words and (b"--run", run.encode()) in pairwise(words):
            found.append(int(path.parent.name))
    return found


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
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(field) for field in fields[11:15]) / _TICKS
