"""The actor on a node: one sandbox server, started there, ended there.

Runs in a worker process of Ray's. Owns the server's process and its private directory. Always true: the token is made
here, and never an argument of a call; the server lives as long as this actor at most, by the end of a pipe and the
death of its parent; an actor is one incarnation, and one that is not the one that was prepared answers nothing; an
actor ends with its node.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, NamedTuple

from backends.environments.catalog import find
from backends.environments.install import install
from backends.sandboxes.private import private_directory
from backends.sandboxes.process import Program, cpu_of, end_of, kill_group
from backends.sandboxes.ray.node import gone
from orchestrator.errors import RolloutError, UsageError
from orchestrator.types import RunId

if TYPE_CHECKING:
    from pathlib import Path

_TAIL: Final = 2000
_LOG: Final = "server.log"


class Prepared(NamedTuple):
    """What a prepared host says of itself. `failure` in words, where the node cannot serve the environment."""

    token: str
    incarnation: str
    node: str
    digest: str
    failure: str | None = None


class Launch(NamedTuple):
    """How a server is started: where it dials in, what it trusts there, whose it is, and its bounds."""

    url: str
    certificate: str | None
    run: str
    solutions: bool
    max_body: int
    memory_mb: int


class SandboxHost:
    """Made by Ray; see the module's docstring."""

    def __init__(self, environment: str, node: str) -> None:
        self._environment = environment
        self._node = node
        self._incarnation = secrets.token_hex(8)
        self._token = secrets.token_urlsafe(24)
        self._program: Program | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._folder: Path | None = None
        self._stack = ExitStack()
        self._watch: asyncio.Task[None] | None = None

    async def ready(self) -> str:
        """Answered once a node has taken the actor: its incarnation."""
        if self._watch is None:
            self._watch = asyncio.create_task(self._end_with_node(), name="node")
        return self._incarnation

    async def _end_with_node(self) -> None:
        await gone()
        try:
            await self.stop()
        finally:
            os._exit(1)  # Ray, which would be asked to, has gone

    async def prepare(self) -> Prepared:
        """Install and stage the environment on this node, where that has not been done."""
        try:
            spec = find(self._environment)
            if not spec.installed:
                await install(spec, progress=lambda line: None)
            self._program = await asyncio.to_thread(Program.of, spec)
        except RolloutError as error:
            return Prepared("", self._incarnation, self._node, "", str(error))
        return Prepared(self._token, self._incarnation, self._node, self._program.digest)

    async def launch(self, incarnation: str, given: Launch) -> int:
        """Start the server, once; its process id. Raises UsageError, SandboxError."""
        if incarnation != self._incarnation or self._process is not None or self._program is None:
            raise UsageError("this actor is another incarnation, or has its server already")
        self._folder = await asyncio.to_thread(self._make_folder)
        config = {
            "url": given.url,
            "certificate": given.certificate,
            "token": self._token,
            "max_body": given.max_body,
            "memory_mb": given.memory_mb,
        }
        with (self._folder / _LOG).open("ab") as log:
            self._process = await self._program.spawn(
                self._folder, RunId(given.run), log, config, solutions=given.solutions
            )
        return self._process.pid

    async def ended(self) -> int:
        """The server's exit status, once it has ended."""
        if self._process is None:
            raise UsageError("no server was launched")
        return await end_of(self._process)

    async def said(self) -> str:
        """The end of what the server has written."""
        if self._folder is None:
            return ""
        data = await asyncio.to_thread((self._folder / _LOG).read_bytes)
        return data[-_TAIL:].decode(errors="replace")

    async def cpu_seconds(self) -> float:
        """User + system CPU of the server so far."""
        return 0.0 if self._process is None else await asyncio.to_thread(cpu_of, self._process.pid)

    async def stop(self) -> float:
        """End the server and remove its directory; its CPU seconds. Idempotent."""
        used = await self.cpu_seconds()
        if self._process is not None:
            kill_group(self._process)
            await self._process.wait()
        await asyncio.to_thread(self._stack.close)
        return used

    def _make_folder(self) -> Path:
        folder = self._stack.enter_context(private_directory()) / f"host-{os.getpid()}"
        folder.mkdir()
        return folder

    def __repr__(self) -> str:  # Ray asks for it once a call
        return f"<SandboxHost {self._environment} {self._incarnation}>"
