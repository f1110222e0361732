"""Containers as the docker command sees them, faults from outside, and a daemon that a test may kill."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from backends.environments.catalog import find
from backends.sandboxes.docker.images import image_name
from backends.sandboxes.docker.owners import RUN
from orchestrator.testing.leaks import children, processes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


def docker(*arguments: str, host: str = "", check: bool = True) -> str:
    """The docker command's output."""
    command = ["docker", *(["--host", host] if host else []), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert not check or done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


def mine(run: str | None = None) -> list[str]:
    """Containers of the project, of one run or of any."""
    label = RUN if run is None else f"{RUN}={run}"
    return docker("ps", "-a", "--filter", f"label={label}", "--format", "{{.Names}}", check=False).split()


def inside(container: str, program: str, *, host: str = "", check: bool = True) -> str:
    """Run a Python program in a container, as its own user."""
    python = "/opt/rollout/venv/bin/python"
    return docker("exec", container, python, "-c", program, host=host, check=check)


@dataclass
class Faults:
    """Hits random sandboxes of a backend for as long as it is entered: one fault after another.

    `strike(container name, host pid)` is the fault; it runs in a thread. `hits` counts those that found their mark.
    """

    backend: Any
    strike: Callable[[str, int], object]
    times: int
    every_s: float
    seed: int = 0
    hits: list[tuple[str, float]] = field(default_factory=list)
    _task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._go(), name="faults")
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.result()

    async def _go(self) -> None:
        rng = random.Random(self.seed)
        while len(self.hits) < self.times:
            await asyncio.sleep(self.every_s)
            alive = {c.id: c.sandbox for c in self.backend._containers.values() if c.sandbox is not None}
            names = sorted(name for name, sandbox in alive.items() if not sandbox.lost.done())
            if names:
                name = rng.choice(names)
                self.hits.append((name, time.monotonic()))
                await asyncio.to_thread(self.strike, name, alive[name].pid)


def kill(container: str, pid: int) -> None:
    """As the daemon kills."""
    docker("kill", container, check=False)


def pause(container: str, pid: int) -> None:
    """As the daemon freezes."""
    docker("pause", container, check=False)


def hang(container: str, pid: int) -> None:
    """The server stops, its container runs on."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)


FILL_MEMORY = """
import mmap, time
with open("/tmp/ballast", "wb") as ballast:
    while True:
        ballast.write(b"x" * 1048576)
"""
CHILD_OOM = "bytearray(b'x') * (4 << 30)"
FILL_DISK = """
try:
    with open("/tmp/ballast", "wb") as ballast:
        while True:
            ballast.write(b"x" * 65536)
except OSError as error:
    print(error.errno)
"""


def oom(container: str, pid: int) -> None:
    """Files in memory fill the container's bound, and the kernel takes the largest process: the server."""
    inside(container, FILL_MEMORY, check=False)


def child_oom(container: str, pid: int) -> None:
    """A process beside the server asks for more than there is."""
    inside(container, CHILD_OOM, check=False)


def fill_disk(container: str, pid: int) -> None:
    """All that can be written is."""
    inside(container, FILL_DISK, check=False)


class PrivateDaemon:
    """A dockerd of its own: own socket, own data, own containerd, no network. Killing it harms nobody.

    It lives in a network namespace of its own: a daemon without a bridge removes `docker0` where it starts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pid_file = folder / "pid"
        self.socket = folder / "d.sock"
        self.url = f"unix://{self.socket}"

    def start(self) -> None:
        """Start it, as nobody's child, and wait until it answers."""
        folder = self._folder
        options = [
            f"--host={self.url}",
            f"--data-root={folder}/data",
            f"--exec-root={folder}/exec",
            f"--pidfile={self._pid_file}",
            "--bridge=none",
            "--iptables=false",
            "--ip6tables=false",
        ]
        command = ["setsid", "--fork", "unshare", "--net", "dockerd", *options]
        with (folder / "log").open("ab") as log:
            subprocess.run(command, stdout=log, stderr=log, check=True)
        ends = time.monotonic() + 30
        while not docker("version", "--format", "{{.Server.Version}}", host=self.url, check=False):
            assert time.monotonic() < ends, (folder / "log").read_text(encoding="utf-8")
            time.sleep(0.1)

    def copy_image(self, environment: str) -> None:
        """Take an environment's image over from the machine's daemon."""
        name = image_name(find(environment))
        with subprocess.Popen(["docker", "save", name], stdout=subprocess.PIPE) as saving:
            command = ["docker", "--host", self.url, "load"]
            subprocess.run(command, stdin=saving.stdout, capture_output=True, check=True)
        assert saving.returncode == 0

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it, with or without a chance to clean up; its containerd goes with it."""
        pids = [int(self._pid_file.read_text(encoding="ascii"))]
        if number is signal.SIGKILL:
            pids += [child.pid for child in children(pids[0])]
        for pid in pids:
            os.kill(pid, number)
        ends = time.monotonic() + 30
        while any(_alive(pid) for pid in pids):
            assert time.monotonic() < ends, "the private daemon does not end"
            time.sleep(0.05)
        self._pid_file.unlink(missing_ok=True)

    def end(self) -> None:
        """Remove all that it has left."""
        if self._pid_file.exists():
            for name in docker("ps", "-aq", host=self.url, check=False).split():
                docker("rm", "-f", name, host=self.url, check=False)
            self.stop()
        for point in _mounts_below(self._folder):
            subprocess.run(["umount", "-l", point], capture_output=True, check=False)


def _alive(pid: int) -> bool:
    return any(process.pid == pid and process.state != "Z" for process in processes())


def _mounts_below(folder: Path) -> Sequence[str]:
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        points = [line.split()[1] for line in mounts]
    return sorted((point for point in points if point.startswith(str(folder))), reverse=True)
