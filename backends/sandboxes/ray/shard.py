"""The actor of a shard: the same episodes, sandboxes and journal as on one machine, told what to play by the driver.

Runs in a worker process of Ray's. Owns its sandboxes, its journal's folder and its connection. Always true: the token
is made here and never an argument; a journal's folder belongs to one living shard (a lock says which); when the driver
goes, the shard ends and leaves its journal to its successor; when the run is complete the journal goes too.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import logging
import os
import pickle
import secrets
import shutil
import threading
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import aiohttp
import orjson

from backends.environments.catalog import home
from backends.sandboxes.ray.node import gone
from backends.server.trust import trusted
from backends.server.wire import PROTOCOL, Hello
from orchestrator.episode import EpisodeServices
from orchestrator.errors import RolloutError, RunFailed, UsageError
from orchestrator.journal import Journal
from orchestrator.playing import LocalPlayer
from orchestrator.pool import Pool
from orchestrator.records import EpisodeBuffer
from orchestrator.shards import ShardRunner
from orchestrator.shards.messages import MAX_FRAME, FrameError
from orchestrator.shards.runner import STANDING_S
from orchestrator.types import RunId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from orchestrator.protocols import Backend, Policy, Sandbox
    from orchestrator.shards import ShardJob
    from orchestrator.types import EpisodeKey

LEAVE_S: Final = 3.0
"""What a shard whose node has gone gets to give back what is under way, and to end its sandboxes."""
HELD_S: Final = 8.0
"""How long a shard waits for its predecessor, which hangs and is being killed, to let go of its journal."""
HELD_LOOKS: Final = 40

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Packed:
    """What the driver sends: the job as it is, backend and policy pickled by Ray's own pickler."""

    job: ShardJob
    backend: bytes
    policy: bytes


class SocketChannel:
    """A WebSocket as a channel of frames. Both ends' sockets have what it uses."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket

    async def send(self, frame: bytes) -> None:
        """See `Channel.send`."""
        await self._socket.send_bytes(frame)

    async def frames(self) -> AsyncIterator[bytes]:
        """See `Channel.frames`."""
        async for message in self._socket:
            if message.type != aiohttp.WSMsgType.BINARY:
                raise FrameError(f"a {message.type.name} message, not a frame")
            yield message.data


class ShardHost:
    """Made by Ray; see the module's docstring."""

    def __init__(self, packed: Packed, slot: int) -> None:
        self._packed = packed
        self._slot = slot
        self._incarnation = secrets.token_hex(8)
        self._token = secrets.token_urlsafe(24)
        self._serving: asyncio.Task[str] | None = None

    async def ready(self) -> str:
        """Answered once a node has taken the actor: its incarnation."""
        return self._incarnation

    async def token(self, incarnation: str) -> str:
        """What the hello will carry."""
        if incarnation != self._incarnation:
            raise UsageError("this actor is another incarnation")
        return self._token

    async def launch(self, incarnation: str, url: str, certificate: str | None, node: str) -> None:
        """Begin to serve, once."""
        if incarnation != self._incarnation or self._serving is not None:
            raise UsageError("this actor is another incarnation, or serves already")
        self._serving = asyncio.create_task(self._serve(url, certificate, node), name=f"shard-{self._slot}")

    async def ended(self) -> str:
        """Why it has ended, once it has."""
        if self._serving is None:
            raise UsageError("the shard was not launched")
        return await asyncio.shield(self._serving)

    async def _serve(self, url: str, certificate: str | None, node: str) -> str:
        try:
            async with AsyncExitStack() as stack:
                shard = _Shard(self._packed, self._slot, node, stack)
                leaving = asyncio.create_task(_leave_with_node(shard), name="node")
                stack.callback(leaving.cancel)
                await shard.serve(url, certificate, self._token)
        except (RolloutError, FrameError, OSError, aiohttp.ClientError) as error:
            log.exception("shard %d ended", self._slot)
            return f"{type(error).__name__}: {error}"
        return "the driver has ended it"


async def _leave_with_node(shard: _Shard) -> None:
    await gone()
    threading.Timer(LEAVE_S, os._exit, (1,)).start()  # Ray, which would be asked to end this process, has gone
    await shard.leave("its node has gone")


class _Shard:
    """One life of a shard."""

    def __init__(self, packed: Packed, slot: int, node: str, stack: AsyncExitStack) -> None:
        self._job = packed.job
        self._backend: Backend = pickle.loads(packed.backend)  # the driver's own, over Ray's channel
        self._policy: Policy = pickle.loads(packed.policy)
        self._slot = slot
        self._node = node
        self._stack = stack
        self._toolsets: dict[str, bytes] = {}
        self._runner: ShardRunner | None = None

    async def serve(self, url: str, certificate: str | None, token: str) -> None:
        """Get ready, dial in, play until the driver ends it. Raises RolloutError, FrameError, OSError."""
        stack = self._stack
        http = await stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusted(certificate)))
        )
        if isinstance(self._policy, AbstractAsyncContextManager):
            await stack.enter_async_context(self._policy)
        pool = await self._start_pool()
        taken = await self._take_journals()
        socket = await stack.enter_async_context(http.ws_connect(url, max_msg_size=MAX_FRAME, compress=0))
        await socket.send_str(orjson.dumps(self._hello(token)._asdict()).decode())
        journal = await self._start_journal(taken)
        runner = self._runner = ShardRunner(self._player(pool, journal), self._node, taken.held)
        told = asyncio.create_task(self._keep_told(runner, pool), name="standing")
        stack.callback(told.cancel)
        gc.collect()
        gc.freeze()
        gc.set_threshold(100_000, 50, 100)
        await runner.run(SocketChannel(socket))
        if runner.complete and journal is not None:
            await journal.close()
            await asyncio.to_thread(_remove, [taken.folder])

    async def leave(self, why: str) -> None:
        """Give back what is under way, and end."""
        if self._runner is not None:
            await self._runner.leave(why)

    async def _start_pool(self) -> Pool:
        job = self._job
        label = RunId(f"{job.run}-{self._slot}")  # the driver, and other shards, may be on this machine too
        self._backend.configure(
            run=label, with_solutions=self._policy.needs_solutions, logs=None, call_limit_s=job.call_limit_s
        )
        await self._stack.enter_async_context(self._backend)
        size = job.sandboxes or os.cpu_count() or 1
        pool = await self._stack.enter_async_context(Pool(self._backend, size, lambda event: None))
        lease = await pool.lease(opens=False)
        lease.release()
        if (digest := lease.sandbox.info.digest) != job.info.digest:
            raise RunFailed(f"this node has {job.info.name} {digest}, the run is of {job.info.digest}: make them equal")
        return pool

    async def _take_journals(self) -> Taken:
        """A folder of this shard's own, and what this machine's dead shards of the run have left."""
        if not self._job.durable_steps:
            return Taken(home() / "shards", [], {})
        locks, parent = self._stack.enter_context(ExitStack()), home() / "shards" / self._job.run
        for _ in range(HELD_LOOKS):
            if not await asyncio.to_thread(held, parent / str(self._slot)):
                break
            await asyncio.sleep(HELD_S / HELD_LOOKS)
        return await asyncio.to_thread(take, parent, self._slot, locks)

    async def _start_journal(self, taken: Taken) -> Journal | None:
        if not self._job.durable_steps:
            return None
        journal = Journal(taken.folder, self._job.run_epoch, on_error=self._journal_failed)
        self._stack.push_async_callback(journal.close)
        journal.start()
        await journal.adopt(
            {key: (attempt, EpisodeBuffer.restore(data)) for key, (attempt, data) in taken.held.items()}
        )
        await asyncio.to_thread(_remove, taken.others)
        return journal

    def _player(self, pool: Pool, journal: Journal | None) -> LocalPlayer:
        services = EpisodeServices(
            pool=pool,
            policy=self._policy,
            emit=lambda event: None,
            touch=(lambda key, attempt, buffer: None) if journal is None else journal.touch,
            poisoned=lambda task: None,
            toolsets=self._toolsets,
            absorb=self._absorb,
        )
        return LocalPlayer(self._job.settings, services, journal)

    def _absorb(self, sandbox: Sandbox) -> None:
        toolsets = sandbox.toolsets()
        if self._runner is not None and (new := {d: body for d, body in toolsets.items() if d not in self._toolsets}):
            self._toolsets.update(new)
            self._runner.tools(new)

    def _journal_failed(self, error: RolloutError) -> None:
        if self._runner is not None:
            self._runner.fail(error)

    async def _keep_told(self, runner: ShardRunner, pool: Pool) -> None:
        while True:
            runner.standing(pool.statistics().live, pool.cpu_seconds())
            await asyncio.sleep(STANDING_S)

    def _hello(self, token: str) -> Hello:
        info = self._job.info
        return Hello(
            protocol=PROTOCOL,
            token=token,
            environment=info.name,
            digest=info.digest,
            isolation=info.isolation,
            deterministic=info.deterministic,
            runs_code=info.runs_code,
            max_turns=info.max_turns,
            pid=os.getpid(),
        )


class Taken(NamedTuple):
    """What a shard has locked: its own folder, folders of the dead, and what all of them hold."""

    folder: Path
    others: list[Path]
    held: dict[EpisodeKey, tuple[int, bytes]]


def take(parent: Path, slot: int, locks: ExitStack) -> Taken:
    """Lock a folder for a shard, and every folder of the run that nobody alive holds. Blocks on the disk."""
    parent.mkdir(parents=True, exist_ok=True)
    free = [folder for folder in sorted(parent.iterdir()) if folder.is_dir() and _lock(folder, locks)]
    found: dict[EpisodeKey, tuple[int, bytes]] = {}
    for folder in free:
        for key, (attempt, data) in Journal.load(folder).items():
            if key not in found or (found[key][0], len(found[key][1])) < (attempt, len(data)):
                found[key] = attempt, data
    own = parent / str(slot)
    if own not in free:
        if own.exists():  # a shard that hangs still has it
            own = parent / f"{slot}-{secrets.token_hex(4)}"
        _lock(own, locks)
        own.mkdir(exist_ok=True)
    return Taken(own, [folder for folder in free if folder != own], found)


def held(folder: Path) -> bool:
    """Whether somebody alive has a shard's folder."""
    with ExitStack() as locks:
        return folder.exists() and not _lock(folder, locks)


def _lock(folder: Path, locks: ExitStack) -> bool:
    """Take a folder's lock, unless somebody alive has it."""
    file = locks.enter_context(folder.with_name(f"{folder.name}.lock").open("ab"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove(folders: Sequence[Path]) -> None:
    """Folders that are of no use any more, with their locks, and the run's own when it is empty."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)
    for folder in folders[:1]:
        try:
            folder.parent.rmdir()
        except OSError:
            return  # others are there
