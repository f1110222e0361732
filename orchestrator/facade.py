"""`Orchestrator`: one run in one directory, from entering to a summary.

Owns the run directory's lock, the store, the journal, the policy, the backend and the pool: built in that order in one
exit stack and committed whole, undone in reverse. Always true: a directory holds one run; a run is collected once, and
`resume=True` goes on with it, raising its epoch, keeping attempts in flight and refusing another environment.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self
from uuid import uuid4

from orchestrator.delivery import consume, hand_over
from orchestrator.engine import Engine
from orchestrator.episode import EpisodeServices, EpisodeSettings
from orchestrator.errors import (
    EnvironmentChanged,
    RolloutError,
    RunExists,
    RunFailed,
    SandboxLost,
    UsageError,
    first_error,
)
from orchestrator.journal import Journal
from orchestrator.planning import Resolved, probe, resolve
from orchestrator.playing import LocalPlayer
from orchestrator.pool import Pool
from orchestrator.protocols import LendingQueue
from orchestrator.records import EpisodeBuffer, header
from orchestrator.retry import RetryPolicy
from orchestrator.rundir import RunDirectory
from orchestrator.scheduler import Scheduler
from orchestrator.shards.job import ShardJob
from orchestrator.shield import shielded
from orchestrator.store import RunMeta, Store, holds_run
from orchestrator.summary import Progress, Summary, summarise
from orchestrator.types import REWARDED, OnAgentKill, RunId

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from orchestrator.events import Event, Listener
    from orchestrator.planning import Plan
    from orchestrator.protocols import Backend, Policy, Sandbox, TrainerQueue
    from orchestrator.shards import Crew, Shards
    from orchestrator.types import EnvironmentInfo, EpisodeKey, Failure, Group, TaskList

log = logging.getLogger(__name__)
COLLECT = "collect"
"""The consumer that `collect` is."""
_TRIES = 3
"""Sandboxes that may be lost while tasks are listed."""
_READY_A_CORE = 4
"""Sandboxes kept ready where each serves one session: their starts keep a core busy at four at once."""
_GRACE_S = 0.5
"""What a server's own timer gets before the engine's sweep ends it."""


class Orchestrator:
    """Collects trajectories: `async with Orchestrator(...) as orch`, then `collect` or `run`, once.

    `backend` makes sandboxes, `policy` acts, `out` is the run directory. `concurrency` episodes run at once on
    `sandboxes` sandboxes (default: one a core, at most as many as episodes run; where a sandbox serves one episode, so
    many are kept ready beside those in use). `seed` decides every random choice.
    `durability="step"` also makes steps in flight durable (default where a model is called), so that `resume=True`
    repeats no model call; `"episode"` only whole episodes. `max_turns` bounds an episode's actions (default: the
    environment's bound), `step_timeout_s` one step, `episode_timeout_s` a whole episode's playing. `on_agent_kill` is
    the reward of an action that kills its sandbox: zero, grade (the state before it) or drop (none). `queue` gets
    every group through `deliver`; `consumer` names one elsewhere. Nothing is admitted while the consumer has
    `max_unacked` groups released and not acked (default: a few times what runs at once; without a consumer only the
    disk bounds). `shards` play the episodes elsewhere, each on sandboxes of its own (`sandboxes` counts those of one
    shard then); plan, store and delivery stay here. `config` is saved with the run; it must hold names of secret
    variables, never values. `listener` hears events.
    """

    def __init__(
        self,
        *,
        backend: Backend,
        policy: Policy,
        out: str | Path,
        concurrency: int = 256,
        sandboxes: int | None = None,
        seed: int = 0,
        durability: Literal["auto", "step", "episode"] = "auto",
        max_turns: int | None = None,
        step_timeout_s: float = 30.0,
        episode_timeout_s: float | None = None,
        on_agent_kill: Literal["zero", "grade", "drop"] = "zero",
        queue: TrainerQueue | None = None,
        consumer: str | None = None,
        max_unacked: int | None = None,
        resume: bool = False,
        retry: RetryPolicy | None = None,
        options: Mapping[str, object] | None = None,
        config: Mapping[str, object] | None = None,
        listener: Listener | None = None,
        shards: Shards | None = None,
    ) -> None:
        _positive(concurrency=concurrency, sandboxes=sandboxes, max_turns=max_turns, max_unacked=max_unacked)
        _positive(step_timeout_s=step_timeout_s, episode_timeout_s=episode_timeout_s)
        if queue is not None and consumer is not None and consumer != queue.name:
            raise UsageError(f"give a queue or a consumer elsewhere, not both ({queue.name!r} and {consumer!r})")
        self._backend = backend
        self._policy = policy
        self._directory = RunDirectory(Path(out))
        self._concurrency = concurrency
        ready = (os.cpu_count() or 1) * (1 if backend.limits.sessions is None else _READY_A_CORE)
        self._sandboxes = 1 if shards is not None else min(sandboxes or ready, concurrency)
        self._shards = shards
        self._shard_sandboxes = sandboxes
        self._crew: Crew | None = None
        self._seed = seed
        self._durable_steps = policy.calls_model if durability == "auto" else durability == "step"
        self._max_turns = max_turns
        self._step_timeout_s = step_timeout_s
        self._episode_timeout_s = episode_timeout_s
        self._on_agent_kill = OnAgentKill(on_agent_kill)
        self._queue = queue
        self._consumer = queue.name if queue is not None else consumer
        self._max_unacked = max_unacked
        self._resume = resume
        self._retry = retry or RetryPolicy()
        self._options = dict(options or {})
        self._config = dict(config or {})
        self._listener = listener
        self._new_run = RunId(uuid4().hex[:12])
        self._stack = AsyncExitStack()
        self._store: Store | None = None
        self._journal: Journal | None = None
        self._pool: Pool | None = None
        self._info: EnvironmentInfo | None = None
        self._engine: Engine | None = None
        self._toolsets: dict[str, bytes] = {}
        self._absorbed: dict[Sandbox, int] = {}
        self._left_out: Mapping[str, Mapping[str, object]] = {}
        self._stored_before = 0
        self._entered = 0.0
        self._drain_asked = False
        self._running: Engine | None = None
        """The engine while it runs."""
        self._delivering: asyncio.Task[None] | None = None
        """The task that gives groups to the queue."""
        self._preparing: asyncio.Task[Any] | None = None
        """The task that prepares the run, until there is an engine to cancel."""
        self.summary: Summary | None = None
        """What the run has come to, once it has ended."""

    async def __aenter__(self) -> Self:
        """Take the directory and start sandboxes.

        Raises UsageError (RunExists, RunBusy, SchemaMismatch, EnvironmentChanged, Unavailable), RunFailed, StoreError.
        """
        self._entered = time.monotonic()
        async with AsyncExitStack() as stack:
            stack.enter_context(self._directory.claim())
            self._stack = stack
            if holds_run(self._directory.store):
                await self._load()
            elif self._resume:
                raise UsageError(f"there is no run in {self._directory.path}; start one with `rollout collect`")
            if self._shards is not None:
                await stack.enter_async_context(self._shards.opened(self._backend, self._policy))
            elif isinstance(self._policy, AbstractAsyncContextManager):
                await stack.enter_async_context(self._policy)
            self._pool = await self._start_pool(stack)
            self._info = await self._meet()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._running is not None:  # a run() in another task, or a collect() that its caller still holds on to
            await self._stop(self._running)
        await self._stack.aclose()

    async def tasks(self, split: str = "") -> TaskList:
        """The tasks of a split in the data's order. Raises UnknownName, Unavailable, RunFailed."""
        lost: SandboxLost | None = None
        for _ in range(_TRIES):
            lease = await self._need_pool().lease(opens=False)
            try:
                return await lease.sandbox.tasks(split)
            except SandboxLost as error:
                lost = error
            finally:
                lease.release()
        raise RunFailed(
            f"{_TRIES} sandboxes were lost while listing tasks ({lost}); their output is in {self._directory.logs}"
        )

    async def run(
        self,
        *,
        split: str = "",
        tasks: Sequence[str] | None = None,
        group_size: int = 1,
        episodes: int | None = None,
    ) -> Summary:
        """Collect `episodes` episodes (default: every task once per sample) in groups of `group_size` samples a task.

        Returns when all is durable, and delivered where a queue was given, or when the run has drained. On resume the
        stored plan counts and the arguments are not needed. Cancelled: episodes in flight are left to a resume.
        Raises UsageError, RunFailed, StoreError.
        """
        engine = await self._prepare(split, tasks, group_size, episodes, self._consumer)
        if engine is None:
            if isinstance(self._queue, LendingQueue):
                await self._queue.finish()  # an earlier life may have died before it could
            return self._ended()
        if self._queue is None:
            await self._run(engine)
            return await self._conclude(engine)
        async with hand_over(self._directory.store, self._queue, engine.releases, self._emit) as delivery:
            await self._beside(engine, delivery)
        return await self._conclude(engine)

    async def collect(
        self,
        *,
        split: str = "",
        tasks: Sequence[str] | None = None,
        group_size: int = 1,
        episodes: int | None = None,
    ) -> AsyncGenerator[Group]:
        """As `run`, and yield every group once it is durable, in the order of release.

        A group is acked when the next one is asked for; the collection pauses while the caller is far behind. Leaving
        the loop early stops the run, and `resume=True` goes on with it.
        """
        if self._consumer is not None:
            raise UsageError("collect() is the consumer itself: use run() with a queue or a consumer elsewhere")
        engine = await self._prepare(split, tasks, group_size, episodes, COLLECT)
        if engine is None:
            return
        running = asyncio.create_task(self._run(engine), name="engine")
        try:
            async with consume(self._directory.store, COLLECT, engine.releases) as groups:
                async for group in groups:
                    yield group
            await running
            await self._conclude(engine)
        finally:
            await self._stop(engine)
            if running.done() and not running.cancelled():
                running.exception()  # seen: it was raised above, or the caller has left

    async def _stop(self, engine: Engine) -> None:
        """Cancel the engine and wait for its end, whatever that is: who waits for the groups has it raised."""
        engine.cancel()
        await shielded(_finish(engine.over), deadline_s=30.0, what="the engine")

    def drain(self) -> None:
        """Start nothing more; what runs goes on to its end. Idempotent; also before the run has begun."""
        self._drain_asked = True
        if self._engine is not None:
            self._engine.drain()

    def cancel(self) -> None:
        """Stop now; episodes in flight are left to a resume. Idempotent.

        While the run is still being prepared, `run` or `collect` is cancelled.
        """
        if self._engine is not None:
            self._engine.cancel()
            if self._delivering is not None:
                self._delivering.cancel()
        elif self._preparing is not None:
            self._preparing.cancel()

    def progress(self) -> Progress:
        """Where the run stands; cheap."""
        engine = self._engine
        pool = None if self._pool is None else self._pool.statistics()
        live, target = (0, self._sandboxes) if pool is None else (pool.live, pool.size)
        if self._crew is not None:
            live = self._crew.statistics().sandboxes
            target = max(live, self._crew.wanted * (self._shard_sandboxes or 1))
        if engine is None:
            elapsed = time.monotonic() - self._entered
            return Progress(0, 0, 0, 0, 0, 0, 0, 0.0, {}, {}, 0, live, target, elapsed, self._drain_asked, "starting")
        scheduler, counters = engine.scheduler, engine.counters
        counts = scheduler.statistics()
        return Progress(
            total=counts.total,
            done=counts.stored,
            running=counts.running,
            waiting=counts.waiting + counts.paused,
            uncommitted=counts.unstored,
            steps=counters.steps,
            rewarded=counters.rewarded,
            reward_sum=counters.reward_sum,
            outcomes=dict(counters.outcomes),
            failures=dict(counters.failures),
            recovered=counters.recovered,
            sandboxes_live=live,
            sandboxes_target=target,
            elapsed_s=time.monotonic() - counters.wall_start,
            draining=scheduler.draining,
            paused="the consumer is behind" if scheduler.lagging else None,
        )

    async def _load(self) -> None:
        """The store of an earlier life of this run."""
        store = Store.load(self._directory.store)
        self._stack.push_async_callback(store.close)
        if not self._resume:
            if store.state == "finished":
                raise RunExists(f"{self._directory.path} holds a finished run: choose another directory")
            raise RunExists(f"{self._directory.path} holds an unfinished run: `rollout resume {self._directory.path}`")
        if store.meta.environment != self._backend.environment:
            raise EnvironmentChanged(
                f"the run in {self._directory.path} is of {store.meta.environment}, not {self._backend.environment}"
            )
        self._seed = store.meta.seed
        self._store = store
        self._toolsets.update(await store.toolsets())

    def _create(self) -> Store:
        """The store of a new run; made when its plan is known, so that a misspelt split leaves no run behind."""
        info = self._need_info()
        meta = RunMeta(self._run_id(), info.name, info.digest, self._seed, time.time(), self._config)
        self._store = Store.create(self._directory.store, meta)
        self._stack.push_async_callback(self._store.close)
        return self._store

    def _run_id(self) -> RunId:
        return self._store.meta.run if self._store is not None else self._new_run

    async def _start_pool(self, stack: AsyncExitStack) -> Pool:
        self._directory.logs.mkdir(parents=True, exist_ok=True)
        self._backend.configure(
            run=self._run_id(),
            with_solutions=self._policy.needs_solutions,
            logs=str(self._directory.logs),
            call_limit_s=self._step_timeout_s + _GRACE_S,
        )
        await stack.enter_async_context(self._backend)
        return await stack.enter_async_context(Pool(self._backend, self._sandboxes, self._emit))

    async def _meet(self) -> EnvironmentInfo:
        """What the first sandbox says of its environment."""
        lease = await self._need_pool().lease(opens=False)
        lease.release()
        info = lease.sandbox.info
        if self._store is not None and self._store.meta.digest != info.digest:
            raise EnvironmentChanged(
                f"{info.name} has changed since the run was recorded ({self._store.meta.digest}, now {info.digest}): "
                "replay would compare two different environments; use the recorded version, or start a new run"
            )
        return info

    async def _prepare(
        self, split: str, tasks: Sequence[str] | None, group_size: int, episodes: int | None, consumer: str | None
    ) -> Engine | None:
        """The engine of this life of the run; None where the run has finished already."""
        self._preparing = asyncio.current_task()
        self._need_pool()
        if self._engine is not None or self.summary is not None:
            raise UsageError("one Orchestrator collects one run: make another with its own directory")
        if self._store is not None and self._store.state == "finished":
            return None
        resolved = await self._resolve(split, tasks, group_size, episodes)
        store = self._store or self._create()
        await store.start(self._committed, self._store_failed)
        if self._resume:
            await store.raise_epoch()
        await store.save_plan(resolved.as_dict())
        engine = await self._make_engine(store, resolved.plan, consumer)
        self._left_out = resolved.left_out
        self._engine = engine
        if self._drain_asked:
            engine.scheduler.draining = True
        return engine

    async def _resolve(
        self, split: str, tasks: Sequence[str] | None, group_size: int, episodes: int | None
    ) -> Resolved:
        """The stored plan where there is one: a resumed run collects what it set out to."""
        stored = await self._store.load_plan() if self._store is not None else None
        if stored is not None:
            return Resolved.from_dict(stored)
        _positive(group_size=group_size, episodes=episodes)
        if tasks is None:
            listed = await self.tasks(split)
            left_out = {name: {"count": count, "needs": needs} for name, (count, needs) in listed.left_out.items()}
            return resolve(listed.ids, left_out, split, group_size, episodes)
        await probe(self._need_pool(), tasks, self._step_timeout_s, self._options)
        return resolve(tasks, {}, split, group_size, episodes)

    async def _make_engine(self, store: Store, plan: Plan, consumer: str | None) -> Engine:
        stored = await store.committed()
        self._stored_before = len(stored)
        if self._shards is None:
            held = await self._open_journal(store.run_epoch, set(stored))
        else:
            held = await self._open_shards(self._shards, store.run_epoch, set(stored))
        open_samples = [
            (key, stored[key].outcome in REWARDED and stored[key].reward is not None)
            for keys in (await store.open_groups()).values()
            for key in keys
        ]
        scheduler = Scheduler(
            plan,
            self._concurrency,
            max_unacked=(self._max_unacked or max(64, 2 * self._concurrency // plan.size)) if consumer else None,
            retry=self._retry,
            stored=frozenset(stored),
            attempts={key: attempt for key, (attempt, _) in held.items()},
            open_samples=open_samples,
        )
        settings = self._settings()
        return Engine(
            scheduler=scheduler,
            player=self._crew or LocalPlayer(settings, self._services(), self._journal),
            head=settings.header,
            emit=self._emit,
            store=store,
            held={key: buffer for key, (_, buffer) in held.items()},
            consumer=consumer,
        )

    async def _open_journal(self, epoch: int, stored: set[EpisodeKey]) -> dict[EpisodeKey, tuple[int, EpisodeBuffer]]:
        """What the journal of the earlier life holds of episodes in flight; and the journal of this one."""
        folder = self._directory.journal
        held = await self._journalled(stored)
        if self._durable_steps:
            self._journal = Journal(folder, epoch, on_error=self._store_failed)
            self._stack.push_async_callback(self._journal.close)
            self._journal.start()
            await self._journal.adopt(held)
        return held

    async def _journalled(self, stored: set[EpisodeKey]) -> dict[EpisodeKey, tuple[int, EpisodeBuffer]]:
        """What this directory's journal holds of episodes in flight."""
        loaded = await asyncio.to_thread(Journal.load, self._directory.journal) if self._resume else {}
        return {
            key: (attempt, EpisodeBuffer.restore(data)) for key, (attempt, data) in loaded.items() if key not in stored
        }

    async def _open_shards(
        self, shards: Shards, epoch: int, stored: set[EpisodeKey]
    ) -> dict[EpisodeKey, tuple[int, EpisodeBuffer]]:
        """Start the shards; what their journals, and that of a life without them, hold of episodes in flight."""
        job = ShardJob(
            run=self._run_id(),
            run_epoch=epoch,
            info=self._need_info(),
            settings=self._settings(),
            durable_steps=self._durable_steps,
            sandboxes=self._shard_sandboxes,
            call_limit_s=self._step_timeout_s + _GRACE_S,
            resume=self._resume,
        )
        self._crew = await self._stack.enter_async_context(shards.crew(job, self._absorb_tools, self._emit))
        self._stack.callback(self._crew_ends)
        self._crew.stored([key for key in self._crew.held if key in stored])
        held = await self._journalled(stored)
        for key, (attempt, buffer) in self._crew.held.items():
            known = held.get(key)
            if key not in stored and (known is None or (known[0], len(known[1].data)) < (attempt, len(buffer.data))):
                held[key] = attempt, buffer
        return held

    def _crew_ends(self) -> None:
        if self._crew is not None:
            self._crew.end(complete=self._engine is not None and self._engine.complete)

    def _absorb_tools(self, toolsets: Mapping[str, bytes]) -> None:
        """Take over the tool sets that a shard has told of."""
        if new := {digest: body for digest, body in toolsets.items() if digest not in self._toolsets}:
            self._toolsets.update(new)
            self._need_store().put_toolsets(new)

    def _settings(self) -> EpisodeSettings:
        info = self._need_info()
        return EpisodeSettings(
            run_seed=self._seed,
            header=header(info.name, info.digest),
            deterministic=info.deterministic,
            max_turns=self._max_turns or info.max_turns,
            step_timeout_s=self._step_timeout_s,
            time_budget_s=self._episode_timeout_s,
            on_agent_kill=self._on_agent_kill,
            options=self._options,
        )

    def _services(self) -> EpisodeServices:
        return EpisodeServices(
            pool=self._need_pool(),
            policy=self._policy,
            emit=self._emit,
            touch=_no_journal if self._journal is None else self._journal.touch,
            poisoned=self._poisoned,
            toolsets=self._toolsets,
            absorb=self._absorb,
        )

    def _poisoned(self, task: str) -> Failure | None:
        return None if self._engine is None else self._engine.scheduler.poisoned(task)

    def _absorb(self, sandbox: Sandbox) -> None:
        """Take over the tool sets that a sandbox has announced since the last look."""
        toolsets = sandbox.toolsets()
        if self._absorbed.get(sandbox, 0) != len(toolsets):
            self._absorbed = {known: count for known, count in self._absorbed.items() if not known.lost.done()}
            self._absorbed[sandbox] = len(toolsets)
            self._toolsets.update(toolsets)
            self._need_store().put_toolsets(toolsets)

    async def _run(self, engine: Engine) -> None:
        """The engine, and the word to its consumers that it is over."""
        self._running = engine
        try:
            await engine.run()
        finally:
            self._running = None
            engine.releases.changed(over=True)

    async def _beside(self, engine: Engine, delivery: Any) -> None:
        """Run the engine and a delivery; the first error ends both."""
        try:
            async with asyncio.TaskGroup() as tasks:
                delivering = self._delivering = tasks.create_task(delivery, name="delivery")
                await self._run(engine)
                if not engine.complete:  # drained or cancelled: what is released stays in the outbox for the resume
                    delivering.cancel()
        except* RolloutError as errors:
            raise first_error(errors) from None
        engine.complete = engine.complete and not delivering.cancelled()

    async def _conclude(self, engine: Engine) -> Summary:
        store = self._need_store()
        await store.flush()
        summary = await summarise(
            engine, store, str(self._directory.path), stored_before=self._stored_before, left_out=self._left_out
        )
        if engine.complete:
            await store.finish(summary.as_dict())
        self.summary = summary
        return summary

    def _ended(self) -> Summary:
        """The summary of a run that had finished before."""
        self.summary = Summary(**dict(self._need_store().summary or {}))
        return self.summary

    def _committed(self, keys: Sequence[EpisodeKey], seqs: Sequence[int]) -> None:
        if self._engine is not None:
            self._engine.committed(keys, seqs)

    def _store_failed(self, error: RolloutError) -> None:
        if self._engine is not None:
            self._engine.fail(error)

    def _emit(self, event: Event) -> None:
        if self._listener is not None:
            try:
                self._listener(event)
            except Exception:  # a listener's fault must not stop the run it listens to
                log.exception("a listener failed at %s", type(event).__name__)

    def _need_pool(self) -> Pool:
        if self._pool is None:
            raise UsageError("enter the orchestrator first: `async with Orchestrator(...) as orch`")
        return self._pool

    def _need_store(self) -> Store:
        if self._store is None:
            raise UsageError("enter the orchestrator first: `async with Orchestrator(...) as orch`")
        return self._store

    def _need_info(self) -> EnvironmentInfo:
        if self._info is None:
            raise UsageError("enter the orchestrator first: `async with Orchestrator(...) as orch`")
        return self._info


async def _finish(over: asyncio.Event) -> None:
    await over.wait()


def _no_journal(key: EpisodeKey, attempt: int, buffer: EpisodeBuffer) -> None:
    """Steps are not made durable in this run."""


def _positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise UsageError(f"{name} must be positive, not {value}")
