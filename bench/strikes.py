"""Faults of containers from outside: what each does, what it must look like, and how soon it must be noticed.

A strike runs in a thread and returns the monotonic time of the fault itself: latencies are counted from there. It goes
through the docker command and the kernel, never through the code that is measured.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from backends.sandboxes.docker.hardening import Hardening
from orchestrator.errors import RunFailed, Unavailable
from orchestrator.types import FailureKind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from backends.sandboxes.docker.container import Container

    Strike = Callable[[Container], float]

COMMAND_S: Final = 60.0
OOM_S: Final = 20.0
_POLL_S: Final = 0.005
_PYTHON: Final = "/opt/rollout/venv/bin/python"
SMALL: Final = Hardening(memory_mb=128, tmp_mb=256)
"""Where files in memory reach the bound of memory before their own."""

FILL_MEMORY: Final = """
with open("/tmp/ballast", "wb") as ballast:
    while True:
        ballast.write(b"x" * 1048576)
"""
CHILD_OOM: Final = "bytearray(b'x') * (4 << 30)"
FILL_DISK: Final = """
try:
    with open("/tmp/ballast", "wb") as ballast:
        while True:
            ballast.write(b"x" * 65536)
except OSError as error:
    print(error.errno)
"""


def docker(*arguments: str, host: str = "", check: bool = True) -> str:
    """The docker command's output. Raises Unavailable where there is no such command, RunFailed where it fails."""
    if shutil.which("docker") is None:
        raise Unavailable("the docker command is not there: install Docker's client")
    command = ["docker", *(["--host", host] if host else []), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_S)
    if check and done.returncode != 0:
        raise RunFailed(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def inside(container: str, program: str, *, host: str = "", check: bool = True) -> str:
    """Run a Python program in a container, as its own user."""
    return docker("exec", container, _PYTHON, "-c", program, host=host, check=check)


def kill(container: Container) -> float:
    """As the daemon kills."""
    began = time.monotonic()
    docker("kill", container.id, check=False)
    return began


def pause(container: Container) -> float:
    """As the daemon freezes; it is frozen when the command returns."""
    docker("pause", container.id, check=False)
    return time.monotonic()


def hang(container: Container) -> float:
    """The server stops, its container runs on."""
    if container.sandbox is not None and container.sandbox.pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(container.sandbox.pid, signal.SIGSTOP)
    return time.monotonic()


def oom(container: Container) -> float:
    """Files in memory fill the container's bound, and the kernel takes the largest process: the server."""
    arguments = ["docker", "exec", container.id, _PYTHON, "-c", FILL_MEMORY]
    ends, before = time.monotonic() + OOM_S, container.usage.oom_kills()
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as filling:
        while container.usage.oom_kills() == before and filling.poll() is None and time.monotonic() < ends:
            time.sleep(_POLL_S)  # a thread's: the kernel announces its kill in a file alone
        killed = time.monotonic()
        filling.kill()
    return killed


def child_oom(container: Container) -> float:
    """A process beside the server asks for more than there is."""
    inside(container.id, CHILD_OOM, check=False)
    return time.monotonic()


def fill_disk(container: Container) -> float:
    """All that can be written is."""
    inside(container.id, FILL_DISK, check=False)
    return time.monotonic()


@dataclass(frozen=True, slots=True)
class Fault:
    """One way in which a container fails. `kind` is what its loss must be called; None: it must go on serving."""

    strike: Strike
    kind: FailureKind | None
    says: str
    """What the loss's message must contain."""
    silent: bool = False
    """Whether only a deadline of ours can tell."""
    hardening: Hardening | None = None


FAULTS: Final[Mapping[str, Fault]] = {
    "kill": Fault(kill, FailureKind.SANDBOX_LOST, "SIGKILL"),
    "oom": Fault(oom, FailureKind.SANDBOX_LOST, "memory", hardening=SMALL),
    "child_oom": Fault(child_oom, None, "", hardening=SMALL),
    "pause": Fault(pause, FailureKind.SANDBOX_HUNG, "limit", silent=True),
    "hang": Fault(hang, FailureKind.SANDBOX_HUNG, "limit", silent=True),
    "disk": Fault(fill_disk, None, ""),
}


def rows_of(fault: Fault) -> dict[str, Any]:
    """What a fault's row says of the fault itself."""
    return {"ends_containers": fault.kind is not None, "silent": fault.silent}
