"""Containers that fail during a run: each fault told truthfully, nobody innocent blamed, every episode right.

Faults come from outside (the daemon's kill and pause, signals, a full memory, a full disk) and from the daemon itself,
which for that is one of the tests' own.
"""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from containers import Faults
from runs import Counted, counting, play, until

from backends.sandboxes.docker import DockerBackend
from backends.sandboxes.docker import backend as module
from backends.sandboxes.docker.container import ADDRESS_SPACE_MB, LEISURE_S, LOG_BYTES, Blueprint
from backends.sandboxes.docker.port import Attachment, Engine, EngineTimeout
from bench.strikes import SMALL, child_oom, fill_disk, hang, inside, kill, oom, pause
from orchestrator.errors import RunFailed, SandboxError
from orchestrator.pool import Pool
from orchestrator.testing.harness import entered, spec, until_lost
from orchestrator.testing.harness import play as exchange
from orchestrator.testing.leaks import children
from orchestrator.types import FailureKind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from backends.sandboxes.docker.container import Container
    from bench.daemon import PrivateDaemon
    from orchestrator.protocols import Sandbox

pytestmark = pytest.mark.usefixtures("containers")

EPISODES = 500
STEP_S = 1.0


async def run_under(
    strike: Callable[[Container], float], tmp_path: Path, *, times: int, every_s: float, **more: Any
) -> Any:
    """A run of 500 episodes on 3 containers, hit again and again: what it came to, and the faults."""
    backend = DockerBackend("toy", **more)
    policy = Counted(counting, think_s=0.15)
    faults = Faults(backend, strike, times=times, every_s=every_s)
    options = {"concurrency": 60, "sandboxes": 3, "episodes": EPISODES, "step_timeout_s": STEP_S}
    played = await play(tmp_path / "run", policy, backend=backend, chaos=faults, **options)
    assert played.summary.outcomes == {"completed": EPISODES}
    assert (played.summary.reward_one, played.summary.duplicates) == (EPISODES, 0)
    assert all(one.failure is None and one.attempt == 0 for one in played.episodes.values()), "nobody is blamed"
    assert policy.repeated() == 0, "no decision is asked for twice"
    assert len(policy.made) == played.summary.steps
    return played, faults


@pytest.mark.parametrize(
    ("strike", "kind", "says", "more"),
    [
        (kill, FailureKind.SANDBOX_LOST, "SIGKILL", {}),
        (pause, FailureKind.SANDBOX_HUNG, "limit 1.5 s", {}),
        (hang, FailureKind.SANDBOX_HUNG, "limit 1.5 s", {}),
        (oom, FailureKind.SANDBOX_LOST, "memory", {"hardening": SMALL}),
    ],
    ids=["kill", "pause", "hang", "oom"],
)
async def test_a_fault_that_ends_containers(
    strike: Callable[[Container], float], kind: FailureKind, says: str, more: dict[str, Any], tmp_path: Path
) -> None:
    played, faults = await run_under(strike, tmp_path, times=3, every_s=0.7, **more)
    assert faults.hits
    assert played.losses()
    for loss in played.losses():
        assert loss.failure.kind is kind, loss.failure.message
        assert says in loss.failure.message
    assert played.summary.recovered_episodes > 0


@pytest.mark.parametrize(
    ("strike", "more"), [(child_oom, {"hardening": SMALL}), (fill_disk, {})], ids=["child", "disk"]
)
async def test_a_fault_that_the_server_survives(
    strike: Callable[[Container], float], more: dict[str, Any], tmp_path: Path
) -> None:
    played, faults = await run_under(strike, tmp_path, times=3, every_s=0.7, **more)
    assert len(faults.hits) == 3
    assert played.losses() == []
    if strike is child_oom:
        backend: Any = faults.backend
        assert backend.statistics().oom_kills >= 1, "it is counted all the same"


@pytest.mark.parametrize(
    ("strike", "within_s"), [(kill, 1.0), (pause, 3.0), (hang, 3.0)], ids=["kill", "pause", "hang"]
)
async def test_how_soon_it_is_noticed(strike: Callable[[Container], float], within_s: float) -> None:
    """The kit's calls may make no progress for two seconds: that and one more is the bound; a death needs one."""
    async with entered(lambda: DockerBackend("toy")) as backend:
        sandbox = await backend.create()
        step = await _waiting_step(sandbox)
        await asyncio.to_thread(strike, container(backend, sandbox))
        began = time.monotonic()
        await until_lost(sandbox)
        assert time.monotonic() - began < within_s
        await asyncio.wait({step})
        assert isinstance(step.exception(), SandboxError)


@pytest.mark.parametrize("strike", [pause, hang])
async def test_a_ready_one_that_hangs_is_found_out_before_anybody_is_given_it(
    strike: Callable[[Container], float],
) -> None:
    backend = DockerBackend("toy", per_episode=True)
    async with entered(lambda: backend), Pool(backend, 1, lambda event: None) as pool:

        async def one_is_ready() -> bool:
            return bool(pool.statistics().live)

        await until(one_is_ready, "a sandbox to be ready")
        [ready] = backend.containers()
        assert ready.sandbox is not None
        began = await asyncio.to_thread(strike, ready)
        await asyncio.wait({ready.sandbox.lost}, timeout=10)
        assert time.monotonic() - began < 2.0 + 1.0, "the deadline of a call, and one second"
        lease = await pool.lease()
        assert lease.sandbox.id != ready.id
        lease.release()


async def test_a_full_memory_is_told_from_a_kill() -> None:
    async with entered(lambda: DockerBackend("toy", hardening=SMALL)) as backend:
        full, killed = await backend.create(), await backend.create()
        await asyncio.to_thread(oom, container(backend, full))
        assert "128 MiB" in (await until_lost(full)).message
        await asyncio.to_thread(kill, container(backend, killed))
        assert "SIGKILL" in (await until_lost(killed)).message


async def test_an_absurd_request_for_memory_fails_alone(tmp_path: Path) -> None:
    """Beyond the server's address space it is an error of that action, where the container's bound would kill all."""
    policy = Counted(lambda view, ctx: [f"memory {ADDRESS_SPACE_MB}", "stop"][view.turn])
    played = await play(tmp_path / "run", policy, backend=DockerBackend("toy"), tasks=["toy_1"])
    [one] = played.episodes.values()
    assert one.failure is not None
    assert "MemoryError" in one.failure.message
    assert played.losses() == []


async def test_a_full_disk_is_bounded_and_harms_nobody() -> None:
    async with entered(lambda: DockerBackend("toy")) as backend:
        sandbox = await backend.create()
        await asyncio.to_thread(fill_disk, container(backend, sandbox))
        size = await asyncio.to_thread(inside, sandbox.id, "import os; print(os.stat('/tmp/ballast').st_size)")
        assert 60 << 20 < int(size) <= 64 << 20
        await exchange(sandbox, "toy_1", seed=1)


async def test_output_without_end_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its beginning is kept; then it is read so slowly that its writer waits."""
    flood = "import os\nwhile True:\n    os.write(2, bytes(65536))"
    real_config, real_read = Blueprint.config, Attachment.read
    reads = 0

    def config(blueprint: Blueprint, *folders: Any) -> dict[str, Any]:
        return real_config(blueprint, *folders) | {"Entrypoint": ["/opt/rollout/venv/bin/python", "-c", flood]}

    async def read(attachment: Attachment) -> bytes:
        nonlocal reads
        reads += 1
        return await real_read(attachment)

    def kept() -> list[int]:
        return [log.stat().st_size for log in tmp_path.glob("rollout-toy-*.log")]

    monkeypatch.setattr(Blueprint, "config", config)
    monkeypatch.setattr(Attachment, "read", read)
    backend = DockerBackend("toy")
    backend.configure(run=module.RunId("flood"), with_solutions=False, logs=str(tmp_path), call_limit_s=5.0)
    async with backend:
        creating = asyncio.create_task(backend.create(), name="creating")

        async def one_is_full() -> bool:
            return await asyncio.to_thread(kept) == [LOG_BYTES]

        await until(one_is_full, "the log to be full")
        before = reads
        await asyncio.sleep(1.0)
        assert reads - before <= 1.0 / LEISURE_S + 1
        creating.cancel()
        await asyncio.wait({creating})
    assert await asyncio.to_thread(kept) == [LOG_BYTES]


async def test_a_removal_that_never_returns(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It is kept in the list of those left, tried again, and others are not held up by it."""
    monkeypatch.setattr(module, "RETRY_S", 0.2)
    monkeypatch.setattr(module, "LOOK_S", 0.1)
    stuck: set[str] = set()
    real = Engine.remove

    async def remove(engine: Engine, container: str, *, within_s: float = 60.0) -> None:
        if container in stuck:
            await asyncio.sleep(0.3)
            raise EngineTimeout(f"remove container {container}: no answer")
        await real(engine, container, within_s=within_s)

    monkeypatch.setattr(Engine, "remove", remove)
    async with entered(lambda: DockerBackend("toy")) as backend:
        one, two = await backend.create(), await backend.create()
        stuck.add(one.id)
        with pytest.raises(EngineTimeout):
            await backend.destroy(one.id)
        assert one.lost.done()
        await backend.destroy(two.id)
        assert backend.statistics().left == 1  # type: ignore[attr-defined]  # the Docker backend's own
        await asyncio.sleep(0.5)
        assert "still cannot be removed" in caplog.text
        stuck.clear()
        await asyncio.sleep(0.6)
        assert backend.statistics().containers == 0  # type: ignore[attr-defined]


async def test_what_is_left_at_the_end_is_the_reapers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def remove(engine: Engine, container: str, *, within_s: float = 60.0) -> None:
        raise EngineTimeout(f"remove container {container}: no answer")

    backend = DockerBackend("toy")
    backend.configure(run=module.RunId("left"), with_solutions=False, logs=None, call_limit_s=5.0)
    async with backend:
        sandbox = await backend.create()
        monkeypatch.setattr(Engine, "remove", remove)
    assert f"left to the reaper, for the daemon does not remove them: {sandbox.id}" in caplog.text
    monkeypatch.undo()
    async with asyncio.timeout(30):
        while True:
            if not await backend.owned_by(module.RunId("left")) and not await asyncio.to_thread(_reapers):
                return
            await asyncio.sleep(0.2)


def _reapers() -> list[int]:
    return [child.pid for child in children() if "docker.reaper" in child.command or child.state == "Z"]


class TestDaemon:
    """The daemon itself fails, in the middle of a run."""

    @asynccontextmanager
    async def outage(self, daemon: PrivateDaemon, number: signal.Signals, down_s: float) -> AsyncIterator[None]:
        async def strike() -> None:
            await asyncio.sleep(1.5)
            await asyncio.to_thread(daemon.stop, number)
            await asyncio.sleep(down_s)
            await asyncio.to_thread(daemon.start)
            self.back = time.monotonic()

        task = asyncio.create_task(strike(), name="outage")
        try:
            yield
        finally:
            await asyncio.wait({task})
            task.result()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
    async def test_a_restart_during_a_run(
        self, number: signal.Signals, private_daemon: PrivateDaemon, tmp_path: Path
    ) -> None:
        started: list[float] = []

        class Noting(DockerBackend):
            async def create(self) -> Any:
                sandbox = await super().create()
                started.append(time.monotonic())
                return sandbox

        policy = Counted(counting, think_s=0.5)
        played = await play(
            tmp_path / "run",
            policy,
            backend=Noting("toy", url=private_daemon.url),
            chaos=self.outage(private_daemon, number, 2.0),
            episodes=200,
            concurrency=40,
        )
        assert played.summary.outcomes == {"completed": 200}
        assert played.summary.reward_one == 200
        assert policy.repeated() == 0
        assert played.losses(), "the sandboxes went with their daemon"
        assert any(self.back < moment < self.back + 10 for moment in started), (
            "it goes on soon after the daemon is back"
        )

    async def test_a_daemon_that_stays_away(
        self, private_daemon: PrivateDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The run ends with an error that says why; nothing that was done is lost, and a resume goes on."""
        monkeypatch.setattr(module, "DAEMON_BACK_S", 1.0)

        policy = Counted(counting, think_s=0.5)

        async def under_way() -> bool:
            return len(policy.made) >= 10

        async def strike() -> None:
            await until(under_way, "decisions")
            await asyncio.to_thread(private_daemon.stop)

        striking = asyncio.create_task(strike(), name="strike")
        common: dict[str, Any] = {"episodes": 100, "concurrency": 10}
        with pytest.raises(RunFailed, match="daemon has been gone"):
            await play(tmp_path / "run", policy, backend=DockerBackend("toy", url=private_daemon.url), **common)
        await asyncio.wait({striking})
        await asyncio.to_thread(private_daemon.start)
        played = await play(
            tmp_path / "run", policy, backend=DockerBackend("toy", url=private_daemon.url), resume=True, **common
        )
        assert played.summary.outcomes == {"completed": 100}


def container(backend: Any, sandbox: Sandbox) -> Container:
    """The container behind a sandbox."""
    found: Container = next(one for one in backend.containers() if one.id == sandbox.id)
    return found


async def _waiting_step(sandbox: Sandbox) -> asyncio.Task[Any]:
    """A step that waits inside the sandbox."""
    session, _ = await sandbox.open(spec("toy_1"))
    step = asyncio.create_task(session.step(b'{"role":"assistant","content":"sleep 30"}'), name="waiting-step")
    other, _ = await sandbox.open(spec("toy_1"))
    other.close()
    return step
