"""The outpost: a container of ours on another machine's daemon, where sandboxes there dial in without a network.

Sandboxes of a daemon on this machine mount the folder of a socket; those elsewhere cannot. So one container with a
network, which runs nothing but `outpost_inside.py`, keeps such folders there, in memory, and connects whoever dials in
to this orchestrator's TCP listener. It is the owner's lease as well: it ends by itself soon after it has last heard of
its owner, however that went, and no clocks are compared.

Always true: it runs before any container that depends on it is made, which carries its name; with it end all
connections through it. One that has ended is replaced when the next sandbox is started.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlsplit

import orjson

from backends.environments.catalog import Resources
from backends.sandboxes.docker import outpost_inside
from backends.sandboxes.docker.hardening import Hardening
from backends.sandboxes.docker.outpost_inside import FOLDER
from backends.sandboxes.docker.owners import LEASE
from backends.sandboxes.docker.port import CALL_S, EngineError, EngineGone, EngineTimeout, NotThere
from orchestrator.errors import Unavailable
from orchestrator.shield import shielded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from backends.sandboxes.docker.port import Attachment, Engine
    from backends.sandboxes.listener import Listener

LEASE_S: Final = 30.0
"""An owner that has not been heard of for so long is dead."""
_RENEWALS: Final = 4
"""In the time of a lease."""
_BOUNDS: Final = Resources(cpus=1.0, memory_mb=256, pids=32, tmp_mb=1, shm_mb=1)
_FILES: Final = 8192
_SOCKETS: Final = "size=4m,mode=0777"
"""Seen by the outpost alone; without a user, since a daemon may map them."""
_PROGRAM: Final = Path(outpost_inside.__file__)
_PYTHON: Final = "/opt/rollout/venv/bin/python"
_LINE_CAP: Final = 65536
_SAID_CAP: Final = 300
_LEAVE_S: Final = 10.0

log = logging.getLogger(__name__)


class Door(Protocol):
    """Where one sandbox dials in."""

    @property
    def folder(self) -> Path:
        """On the daemon's machine: what the sandbox's container mounts."""
        ...

    async def open(self) -> None:
        """Begin to listen. Raises EngineError, OSError."""
        ...

    async def shut(self) -> None:
        """Accept nobody more. Idempotent; raises nothing where it is gone already."""
        ...


class OutpostRefused(EngineError):
    """An outpost could not do what it was asked, and says why."""


class Outposts:
    """The outpost of a backend, and the ones after it. `network` is the one of the daemon's that it is given, `labels`
    name its owner, `lease_s` is its lease in seconds."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        listener: Listener,
        tasks: asyncio.TaskGroup,
        *,
        image: str,
        network: str,
        labels: Mapping[str, str],
        lease_s: float,
    ) -> None:
        self._name = name
        self._engine = engine
        self._listener = listener
        self._tasks = tasks
        self._image, self._network, self._labels, self._lease_s = image, network, labels, lease_s
        self._count = 0
        self._changing = asyncio.Lock()
        self._current: Outpost | None = None
        self._left: list[Outpost] = []
        """Those that the daemon has not removed yet."""

    async def begin(self) -> None:
        """Start the first one. Raises Unavailable where it does not reach this machine, or has no network to do so by;
        EngineError."""
        try:
            await self.door()
        except OutpostRefused as error:
            raise Unavailable(str(error)) from None
        except NotThere as error:
            raise Unavailable(
                f"the Docker daemon at {self._engine.url} cannot start the outpost, by which its containers reach this "
                f"machine ({error}): it needs the network {self._network!r}, so start it without --bridge=none"
            ) from None

    async def door(self) -> tuple[Door, str]:
        """A door that is not open yet, and the name of the outpost that keeps it. Raises EngineError where there is
        none and none can be started, OutpostRefused where it does not reach this machine."""
        async with self._changing:
            if self._current is None or self._current.ended:
                await self.close()  # what stays is tried again
                self._count += 1
                post = self._current = Outpost(f"{self._name}-outpost-{self._count}", self._engine)
                program = await asyncio.to_thread(_PROGRAM.read_text, encoding="utf-8")
                await post.start(self._config(post.id, program), self._letter(), self._tasks, self._lease_s)
                await self._reach(post)
            return self._current.door(), self._current.id

    async def close(self) -> list[str]:
        """Remove it, and with it every connection, and those before it that are left; the names of what the daemon does
        not remove in time."""
        if self._current is not None:
            self._left.append(self._current)
            self._current = None
        removing = self._left
        async with asyncio.TaskGroup() as tasks:
            gone = [tasks.create_task(_removed(post), name=f"remove-{post.id}") for post in removing]
        self._left = [post for post, done in zip(removing, gone, strict=True) if not done.result()]
        return [post.id for post in self._left]

    async def _reach(self, post: Outpost) -> None:
        try:
            await post.ask("reach")
        except OutpostRefused as error:
            post.ended = True
            raise OutpostRefused(
                f"containers of the Docker daemon at {self._engine.url} do not reach this machine at "
                f"{self._listener.url} ({error}): say with --listen HOST[:PORT] where they do, and let them through "
                "its firewall"
            ) from None

    def _letter(self) -> bytes:
        """What it reads first."""
        parts = urlsplit(self._listener.url)
        config = {"host": parts.hostname, "port": parts.port, "certificate": self._listener.certificate}
        return orjson.dumps({**config, "lease_s": self._lease_s}) + b"\n"

    def _config(self, name: str, program: str) -> dict[str, Any]:
        """The body of the engine's call. It runs no image's own program, and what it holds lies in memory."""
        host = Hardening(network=self._network, open_files=_FILES).host_config(_BOUNDS)
        driver = {"Name": "local", "Options": {"type": "tmpfs", "device": "tmpfs", "o": _SOCKETS}}
        host["Mounts"] = [{"Type": "volume", "Target": FOLDER, "VolumeOptions": {"DriverConfig": driver}}]
        return {
            "Image": self._image,
            "Entrypoint": [_PYTHON, "-I", "-c", program],
            "Cmd": [],
            "User": Hardening().user,
            "WorkingDir": "/",
            "Labels": {**self._labels, LEASE: name},
            "AttachStdin": True,
            "AttachStdout": True,
            "AttachStderr": True,
            "OpenStdin": True,
            "StdinOnce": True,
            "HostConfig": host,
        }


async def _removed(post: Outpost) -> bool:
    return await shielded(post.remove(), deadline_s=_LEAVE_S, what=post.id)


class Outpost:
    """One container: started once, asked one thing at a time, removed once."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.id = name
        self.ended = False
        """Whether it has ended, or does not answer."""
        self._engine = engine
        self._attachment: Attachment | None = None
        self._folder = Path()
        self._asked: dict[str, asyncio.Future[EngineError | None]] = {}
        self._made: asyncio.Task[EngineError | None] | None = None
        self._said = ""
        self._chores: list[asyncio.Task[None]] = []
        self._doors = 0

    async def start(self, config: dict[str, Any], letter: bytes, tasks: asyncio.TaskGroup, lease_s: float) -> None:
        """Make it and wait until it answers. Raises EngineError, and OutpostRefused where it says why it has ended;
        then remove it."""
        self._made = tasks.create_task(self._make(config), name=f"make-{self.id}")
        try:
            if (error := await asyncio.shield(self._made)) is not None:
                raise error
            self._attachment = await self._engine.attach(self.id)
            self._chores.append(tasks.create_task(self._hear(self._attachment), name=f"hear-{self.id}"))
            await self._engine.start(self.id)
            await self._attachment.write(letter)
            await self.ask("alive")
            self._folder = Path(await self._engine.mounted(self.id, FOLDER))
        except EngineGone as error:
            self.ended = True
            if self._said:  # so the daemon has not gone: it is not waited for
                raise OutpostRefused(str(error)) from None
            raise
        except BaseException:  # cancellation included: it is never taken for one that serves
            self.ended = True
            raise
        self._chores.append(tasks.create_task(self._renew(lease_s), name=f"renew-{self.id}"))

    def door(self) -> RemoteDoor:
        """One more, not open yet."""
        self._doors += 1
        return RemoteDoor(self, f"s{self._doors}", self._folder)

    async def ask(self, line: str) -> None:
        """Have it do something, and wait for that. Raises EngineError; what does not answer in time has ended, and
        OutpostRefused where it fails."""
        if self.ended or self._attachment is None:
            raise EngineGone(f"{self.id} has ended: {self._why()}")
        done = self._asked[line] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(CALL_S):
                await self._attachment.write(f"{line}\n".encode())
                error = await done
        except TimeoutError:
            self.ended = True
            raise EngineTimeout(f"{self.id} did not answer within {CALL_S:g} s") from None
        finally:
            self._asked.pop(line, None)
        if error is not None:
            raise error

    async def remove(self) -> None:
        """End it. Raises EngineError where the daemon does not do it."""
        self.ended = True
        for chore in self._chores:
            chore.cancel()
        error = None if self._made is None else await asyncio.shield(self._made)
        if self._attachment is not None:
            await self._attachment.close()
        if not (isinstance(error, EngineGone) and not error.asked):
            await self._engine.remove(self.id)

    async def _make(self, config: dict[str, Any]) -> EngineError | None:
        """Never cancelled: a container that the daemon makes after all would be nobody's."""
        try:
            await self._engine.create(self.id, config)
        except EngineError as error:
            return error
        return None

    async def _hear(self, attachment: Attachment) -> None:
        """Take its answers in; remember what else it says. Its output ends with it."""
        buffer = ""
        while data := await attachment.read():
            *lines, buffer = (buffer + data.decode(errors="replace"))[-_LINE_CAP:].split("\n")
            for line in lines:
                self._take(line)
        self.ended = True
        for done in self._asked.values():
            if not done.done():
                done.set_result(EngineGone(f"{self.id} has ended: {self._why()}"))

    def _take(self, line: str) -> None:
        result, _, rest = line.partition(" ")
        asked, _, why = rest.partition(": ")
        done = self._asked.pop(asked, None) if result in {"done", "failed"} else None
        if done is None:
            self._said = line[:_SAID_CAP]
        elif not done.done():
            done.set_result(None if result == "done" else OutpostRefused(why[:_SAID_CAP]))

    async def _renew(self, lease_s: float) -> None:
        while not self.ended:
            await asyncio.sleep(lease_s / _RENEWALS)
            try:
                await self.ask("alive")
            except EngineError as error:
                log.warning("%s; the next sandbox gets another", error)

    def _why(self) -> str:
        return self._said or "it did not say why"


class RemoteDoor:
    """A socket in a folder of the outpost's."""

    def __init__(self, outpost: Outpost, name: str, folder: Path) -> None:
        self._outpost = outpost
        self._name = name
        self.folder = folder / name

    async def open(self) -> None:
        """See `Door`. Raises EngineError."""
        await self._outpost.ask(f"open {self._name}")

    async def shut(self) -> None:
        """See `Door`: with an outpost that has ended its doors are gone."""
        try:
            await self._outpost.ask(f"shut {self._name}")
        except EngineError as error:
            log.debug("%s", error)
