"""The Docker backend: each sandbox is a container, walled off by default, that dials out to this process.

Owns the listener, every container it started, the outpost where the daemon is another machine's, and the reaper. Always
true: a container is registered here before anything is awaited on it, and forgotten only when the daemon says that it
is gone; what cannot be removed in time is in the list of those left, which is worked on as long as the backend is
entered, reported when it is left, and then the reaper's. The reaper lives as long as this process and a little longer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from backends.environments.catalog import find
from backends.sandboxes.docker.carried import carrying
from backends.sandboxes.docker.container import START_S, Blueprint, Container
from backends.sandboxes.docker.egress import AllowList
from backends.sandboxes.docker.hardening import Hardening
from backends.sandboxes.docker.images import ensure
from backends.sandboxes.docker.outpost import LEASE_S, Outposts
from backends.sandboxes.docker.owners import BACKEND, RUN, clear_at_leisure, owner_labels
from backends.sandboxes.docker.port import Engine, EngineError, EngineGone
from backends.sandboxes.docker.reach import DialIn, refuse_egress
from backends.sandboxes.docker.reaping import Reaper
from backends.sandboxes.docker.usage import HostUsage, host_usage
from backends.sandboxes.listener import Listener
from backends.server.wire import MAX_BODY, MAX_CHILDREN
from orchestrator.errors import SandboxError, Unavailable, UsageError
from orchestrator.protocols import SandboxLimits
from orchestrator.shield import ended_within, shielded
from orchestrator.types import Failure, FailureKind, RunId, SandboxId

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from backends.environments.catalog import EnvironmentSpec
    from backends.sandboxes.docker.outpost import Door
    from backends.sandboxes.docker.port import Progress
    from backends.sandboxes.link import LinkedSandbox

DAEMON_BACK_S: Final = 60.0
"""A daemon that is gone may be restarting: a start waits this long for it."""
DAEMON_POLL_S: Final = 0.25
STARTS_A_CORE: Final = 4
"""Starts at once; beyond this each takes longer and none more is done."""
LOOK_S: Final = 1.0
"""How often containers are looked at: what they use, and whether those left can be removed by now."""
RETRY_S: Final = 30.0
"""Between two tries to remove what is left; also how long one try may take."""
LEAVE_S: Final = 10.0
"""How long leaving the backend waits for removals, and a start that has failed for its own."""
_INSTALL: Final = {"runsc": "install gVisor (https://gvisor.dev/docs/user_guide/install), run `runsc install`"}

log = logging.getLogger(__name__)


class DockerStatistics(NamedTuple):
    """Containers registered, of which `left` could not be removed yet; what they use and how many of their processes
    were killed for memory; refused ways out; and how the machine stands."""

    containers: int
    left: int
    started: int
    memory_bytes: int
    cpu_seconds: float
    oom_kills: int
    egress_refused: int
    host: HostUsage


class DockerBackend:
    """Sandboxes as containers of a Docker daemon, this machine's or another's.

    `environment` names an environment of the catalogue. Its image is found, pulled or built on entering, which
    `progress` hears of; `image` names one of your own. `hardening` is how containers are walled off; `url` is the
    daemon's (default: as the docker command finds it). A container serves many sessions, unless the environment runs
    the agent's code or `per_episode` says so: then one, and is removed with it. `recycle_after` replaces a container
    after so many sessions; one that uses most of its memory is replaced in any case.

    Where the daemon is reached over TCP, `host` is the address of this machine that its containers reach (default: the
    one that it is reached from), `port` where they dial in (default: any free one), `insecure` leaves TLS out;
    `outpost_network` is the daemon's network that the outpost is given, and `lease_s` for how long (in seconds) an
    owner may be silent before others take it for dead. What such containers use is not seen, and reads zero.
    """

    def __init__(
        self,
        environment: str,
        *,
        image: str | None = None,
        hardening: Hardening | None = None,
        url: str | None = None,
        per_episode: bool | None = None,
        recycle_after: int | None = None,
        max_body: int = MAX_BODY,
        progress: Progress | None = None,
        host: str | None = None,
        port: int = 0,
        insecure: bool = False,
        outpost_network: str = "bridge",
        lease_s: float = LEASE_S,
    ) -> None:
        self.spec: EnvironmentSpec = find(environment)
        self.environment = self.spec.name
        alone = self.spec.runs_code if per_episode is None else per_episode
        together = MAX_CHILDREN if self.spec.isolation == "process" else None
        self.limits = SandboxLimits(1, 1) if alone else SandboxLimits(together, recycle_after)
        self._image = image
        self._hardening = hardening or Hardening()
        own = self._hardening.egress
        self._allowed = AllowList.of(self.spec.egress if own is None else own)
        self._url = url
        self._max_body = max_body
        self._progress: Progress = progress or _silent
        self._run = RunId("")
        self._with_solutions = False
        self._limit_s = START_S
        self._logs: Path | None = None
        self._containers: dict[SandboxId, Container] = {}
        self._left: dict[SandboxId, float] = {}
        """What could not be removed, and when to try again."""
        self._dead_cpu = 0.0
        self._dead_oom_kills = 0
        self._dead_refused = 0
        self._dial_in = DialIn(host, port, insecure)
        self._outpost_network, self._lease_s = outpost_network, lease_s
        self._listener = Listener()
        self._outposts: Outposts | None = None
        self._starts = asyncio.Semaphore(STARTS_A_CORE * (os.cpu_count() or 1))
        self._stack = AsyncExitStack()
        self._tasks: asyncio.TaskGroup | None = None
        self._chores: set[asyncio.Task[None]] = set()
        self._engine: Engine | None = None
        self._blueprint: Blueprint | None = None
        self._reaper: Reaper | None = None
        self._prefix = f"rollout-{self.environment}-{secrets.token_hex(4)}"
        self._count = 0

    def configure(self, *, run: RunId, with_solutions: bool, logs: str | None, call_limit_s: float) -> None:
        """See `Backend.configure`."""
        self._run = run
        self._with_solutions = with_solutions
        self._logs = Path(logs) if logs is not None else None
        self._limit_s = call_limit_s

    async def __aenter__(self) -> Self:
        """Raises Unavailable where there is no daemon, it lacks the runtime that was asked for, no image can be had, or
        its containers do not reach this machine; UsageError for what such a daemon cannot do; EngineError."""
        async with AsyncExitStack() as stack:
            self._engine = await stack.enter_async_context(await Engine.connect(self._url))
            stack.callback(self._forget_engine)
            await self._check_runtime(self._engine)
            self._listener = Listener(await self._dial_in.tcp(self._engine))
            self._blueprint = await self._draw(self._engine)
            await stack.enter_async_context(self._listener)
            self._reaper = await self._start_reaper(self._engine)
            self._tasks = await stack.enter_async_context(asyncio.TaskGroup())
            stack.push_async_callback(self._leave)
            if self._engine.remote:
                self._outposts = self._post(self._engine, self._tasks)
            self._chore(self._clear(self._engine), "clear-strays")
            self._chore(self._look(), "look-at-containers")
            self._stack = stack.pop_all()
        if self._outposts is not None:
            await self._begin(self._outposts)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def create(self) -> LinkedSandbox:
        """See `Backend.create`. While the daemon is gone it waits for it, for a minute."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + DAEMON_BACK_S
        while True:
            try:
                async with self._starts:
                    return await self._create()
            except EngineGone as error:
                if loop.time() >= ends:
                    raise _not_started(f"the Docker daemon has been gone for {DAEMON_BACK_S:g} s ({error})") from None
                await self._daemon_back(ends)
            except (EngineError, OSError) as error:
                raise _not_started(str(error)) from None

    async def destroy(self, sandbox: SandboxId) -> None:
        """See `Backend.destroy`. Raises EngineError where the daemon does not do it; it is tried again later."""
        if (container := self._containers.get(sandbox)) is not None:
            self._left[sandbox] = asyncio.get_running_loop().time() + RETRY_S
            await container.let_go()
        if container is None or not container.never_made:
            await self.engine.remove(sandbox)
        self._forget(sandbox)

    async def owned_by(self, run: RunId) -> Sequence[SandboxId]:
        """See `Backend.owned_by`: containers that carry the run's label, whoever started them, ended ones too."""
        if self._engine is not None:
            found = await self._engine.containers({RUN: run})
        else:
            async with await Engine.connect(self._url) as engine:
                found = await engine.containers({RUN: run})
        return [SandboxId(one.names[0]) for one in found]

    def cpu_seconds(self) -> float:
        """See `Backend.cpu_seconds`."""
        return self._dead_cpu + sum(container.usage.cpu_seconds() for container in self._containers.values())

    @property
    def private(self) -> Path:
        """Where the sockets of its containers lie; gone when the backend is left."""
        return self._listener.private

    def containers(self) -> list[Container]:
        """Those that are registered: starting, serving, and not yet removed."""
        return list(self._containers.values())

    def statistics(self) -> DockerStatistics:
        """Counts, and what the containers and the machine use now; reads a few small files for each."""
        containers = self._containers.values()
        return DockerStatistics(
            containers=len(containers),
            left=len(self._left),
            started=self._count,
            memory_bytes=sum(container.usage.memory_bytes() for container in containers),
            cpu_seconds=self.cpu_seconds(),
            oom_kills=self._dead_oom_kills + sum(container.usage.oom_kills() for container in containers),
            egress_refused=self._dead_refused + sum(container.refused for container in containers),
            host=host_usage(),
        )

    def __repr__(self) -> str:
        return f"<DockerBackend {self.environment} containers={len(self._containers)} left={len(self._left)}>"

    async def _create(self) -> LinkedSandbox:
        self._count += 1
        name = SandboxId(f"{self._prefix}-{self._count}")
        door, lease = await self._door()
        container = Container(name, self.blueprint, self.engine, self._need_tasks(), lease)
        self._containers[name] = container
        try:
            return await container.start(self._listener, door)
        except BaseException:  # cancellation included: what was started is ended
            await shielded(self._undo(name), deadline_s=LEAVE_S, what=name)
            raise

    async def _begin(self, outposts: Outposts) -> None:
        try:
            await outposts.begin()
        except BaseException:  # cancellation included: what was entered is left
            await self._stack.aclose()
            raise

    async def _door(self) -> tuple[Door, str]:
        """Where one container dials in, and what outpost it depends on for that; "" for none."""
        return (self._listener.door(), "") if self._outposts is None else await self._outposts.door()

    async def _undo(self, name: SandboxId) -> None:
        try:
            await self.destroy(name)
        except EngineError as error:
            log.warning("%s is left for later: %s", name, error)

    def _forget(self, name: SandboxId) -> None:
        """The daemon says that it is gone."""
        self._left.pop(name, None)
        if (container := self._containers.pop(name, None)) is not None:
            self._dead_cpu += container.usage.cpu_seconds()
            self._dead_oom_kills += container.usage.oom_kills()
            self._dead_refused += container.refused

    async def _look(self) -> None:
        """Now and then: what containers use, before they end; what is left; and whether the reaper lives."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LOOK_S)
            for container in self._containers.values():
                container.look()
            for name, again in self._left.items():
                if loop.time() >= again:
                    self._left[name] = loop.time() + RETRY_S
                    self._chore(self._retry(name), f"remove-{name}")
            await self._keep_reaper()

    async def _clear(self, engine: Engine) -> None:
        """What dead owners have left: those of this machine have reapers too, so one look will do; those of others have
        none left once their machine is gone."""
        await clear_at_leisure(engine)
        while engine.remote:
            await asyncio.sleep(self._lease_s)
            await clear_at_leisure(engine)

    async def _keep_reaper(self) -> None:
        if self._reaper is not None:
            try:
                await asyncio.to_thread(self._reaper.keep)
            except OSError as error:  # no process or file is to be had just now: that ends no run
                log.warning("the reaper has ended, and no other can be started yet: %s", error)

    async def _retry(self, name: SandboxId) -> None:
        try:
            await self.engine.remove(name, within_s=RETRY_S)
        except EngineError as error:
            log.warning("%s still cannot be removed: %s", name, error)
        else:
            self._forget(name)

    async def _leave(self) -> None:
        """Remove everything; what does not go in time is the reaper's."""
        for chore in self._chores:
            chore.cancel()
        removing = {asyncio.create_task(self._undo(name), name=f"destroy-{name}") for name in self._containers}
        await ended_within(removing, LEAVE_S)
        left: list[str] = list(self._containers)
        if self._outposts is not None:
            left += await self._outposts.close()
        reaper, self._reaper = self._reaper, None
        if reaper is not None:
            await reaper.leave(left)

    async def _draw(self, engine: Engine) -> Blueprint:
        refuse_egress(engine, self._allowed)
        digest, data = await asyncio.to_thread(lambda: (self.spec.digest, self.spec.data_folder))
        image = await ensure(engine, self.spec, self._image, self._progress)
        if engine.remote and data is not None:
            image, data = await carrying(engine, self.spec, image, data, self._progress), None
        return Blueprint(
            spec=self.spec,
            digest=digest,
            data=data,
            image=image,
            hardening=self._hardening,
            run=self._run,
            owner=self._owner(),
            with_solutions=self._with_solutions,
            logs=self._logs,
            limit_s=self._limit_s,
            max_body=self._max_body,
            allowed=self._allowed,
        )

    def _owner(self) -> dict[str, str]:
        return {BACKEND: self._prefix, **owner_labels()}

    def _post(self, engine: Engine, tasks: asyncio.TaskGroup) -> Outposts:
        return Outposts(
            self._prefix,
            engine,
            self._listener,
            tasks,
            image=self.blueprint.image,
            network=self._outpost_network,
            labels=self._owner(),
            lease_s=self._lease_s,
        )

    async def _check_runtime(self, engine: Engine) -> None:
        """Before anything is built: a runtime that the daemon does not know fails every start."""
        wanted = self._hardening.runtime
        known = sorted((await engine.info())["Runtimes"]) if wanted else []
        if wanted and wanted not in known:
            how = _INSTALL.get(wanted, "install it, name it under `runtimes` in the daemon's daemon.json")
            raise Unavailable(
                f"the Docker daemon has no runtime {wanted!r} (it has {', '.join(known)}): {how} and restart the "
                "daemon, or leave the item `runtime` out"
            )

    async def _start_reaper(self, engine: Engine) -> Reaper:
        output = Path(os.devnull) if self._logs is None else self._logs / "reaper.log"
        return await Reaper.start(
            url=engine.url, labels={BACKEND: self._prefix}, private=self._listener.private, log=output
        )

    async def _daemon_back(self, ends: float) -> None:
        """Until the daemon answers again, or time is up."""
        loop = asyncio.get_running_loop()
        while loop.time() < ends:
            try:
                await self.engine.version()
            except EngineError:
                await asyncio.sleep(DAEMON_POLL_S)
            else:
                return

    def _forget_engine(self) -> None:
        self._engine = None

    def _chore(self, work: Coroutine[object, object, None], name: str) -> None:
        chore = self._need_tasks().create_task(work, name=name)
        self._chores.add(chore)
        chore.add_done_callback(self._chores.discard)

    @property
    def engine(self) -> Engine:
        """The connection to the daemon, while the backend is entered."""
        if self._engine is None:
            raise UsageError("enter the backend first: `async with DockerBackend(...)`")
        return self._engine

    @property
    def blueprint(self) -> Blueprint:
        """What its containers are made by, while it is entered."""
        if self._blueprint is None:
            raise UsageError("enter the backend first: `async with DockerBackend(...)`")
        return self._blueprint

    def _need_tasks(self) -> asyncio.TaskGroup:
        if self._tasks is None:
            raise UsageError("enter the backend first: `async with DockerBackend(...)`")
        return self._tasks


def _not_started(message: str) -> SandboxError:
    return SandboxError(Failure(FailureKind.SANDBOX_START, "start", message))


def _silent(step: object) -> None:
    """Nobody wants to hear of progress."""
