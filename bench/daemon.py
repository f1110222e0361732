"""A Docker daemon of one's own, to be stopped and killed without harm to anybody.

Always true: its socket, data, processes and containerd are its own, it lives in a network namespace of its own (a
daemon without a bridge removes `docker0` where it starts), and `end` leaves nothing of it. Needs root and `dockerd`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from backends.environments.catalog import find
from backends.sandboxes.docker.images import image_name
from bench.strikes import docker
from orchestrator.errors import RunFailed, Unavailable
from orchestrator.testing.leaks import children, processes

if TYPE_CHECKING:
    from collections.abc import Sequence

START_S: Final = 60.0
STOP_S: Final = 30.0
NO_NETWORK: Final = ("--bridge=none", "--iptables=false", "--ip6tables=false")
_POLL_S: Final = 0.05


class PrivateDaemon:
    """See the module's docstring. Every method blocks: call them in a thread.

    `folder` holds its sockets, so its path must be short; `data` its images and containers (default: below `folder`).
    `options` are further ones of dockerd's; by default it gives its containers no network.
    """

    def __init__(self, folder: Path, data: Path | None = None, options: Sequence[str] = NO_NETWORK) -> None:
        self._folder = folder
        self._data = data or folder / "data"
        self._options = options
        self._pid_file = folder / "pid"
        self.socket = folder / "d.sock"
        self.url = f"unix://{self.socket}"

    def start(self) -> None:
        """Start it, as nobody's child, and wait until it answers. Raises Unavailable, RunFailed."""
        if os.geteuid() != 0 or not all(map(shutil.which, ("dockerd", "setsid", "unshare"))):
            raise Unavailable("a private Docker daemon needs root, dockerd, setsid and unshare")
        folder = self._folder
        options = [
            f"--host={self.url}",
            f"--data-root={self._data}",
            f"--exec-root={folder}/exec",
            f"--pidfile={self._pid_file}",
            *self._options,
        ]
        command = ["setsid", "--fork", "unshare", "--net", "dockerd", *options]
        with (folder / "log").open("ab") as log:
            subprocess.run(command, stdout=log, stderr=log, check=True)
        ends = time.monotonic() + START_S
        while not docker("version", "--format", "{{.Server.Version}}", host=self.url, check=False):
            if time.monotonic() > ends:
                raise RunFailed(f"the private daemon does not start:\n{(folder / 'log').read_text(encoding='utf-8')}")
            time.sleep(_POLL_S)

    def copy_image(self, environment: str) -> None:
        """Take an environment's image over from the machine's daemon. Raises RunFailed."""
        self.copy(image_name(find(environment)))

    def copy(self, name: str) -> None:
        """Take an image over from the machine's daemon. Raises RunFailed."""
        with subprocess.Popen(["docker", "save", name], stdout=subprocess.PIPE) as saving:
            command = ["docker", "--host", self.url, "load"]
            loaded = subprocess.run(command, stdin=saving.stdout, capture_output=True, check=False)
        if saving.returncode or loaded.returncode:
            raise RunFailed(f"image {name} cannot be copied: {loaded.stderr.decode(errors='replace')}")

    @property
    def pid(self) -> int:
        """Its process, once it has started."""
        return int(self._pid_file.read_text(encoding="ascii"))

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it, with or without a chance to clean up; its containerd goes with it. Raises RunFailed."""
        pids = [self.pid]
        if number is signal.SIGKILL:
            pids += [child.pid for child in children(pids[0])]
        for pid in pids:
            os.kill(pid, number)
        ends = time.monotonic() + STOP_S
        while any(map(_alive, pids)):
            if time.monotonic() > ends:
                raise RunFailed("the private daemon does not end")
            time.sleep(_POLL_S)
        # A killed one leaves both behind: the next would take whoever has such a number by then for its containerd.
        for file in (self._pid_file, self._folder / "exec" / "containerd" / "containerd.pid"):
            file.unlink(missing_ok=True)

    def end(self) -> None:
        """Remove all that it has left."""
        if self._pid_file.exists():
            for name in docker("ps", "-aq", host=self.url, check=False).split():
                docker("rm", "-f", name, host=self.url, check=False)
            self.stop()
        for point in (*_mounts_in(self._folder), *_mounts_in(self._data)):
            subprocess.run(["umount", "-l", point], capture_output=True, check=False)


def _alive(pid: int) -> bool:
    return any(process.pid == pid and process.state != "Z" for process in processes())


def _mounts_in(folder: Path) -> Sequence[str]:
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    return sorted((point for point in points if Path(point).is_relative_to(folder)), reverse=True)
