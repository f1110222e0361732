"""The Docker backend on a real daemon: its contract, whole runs, what inspect shows, what is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from containers import docker, inside, mine
from runs import Counted, counting, equal, play

from backends.sandboxes.docker import DockerBackend
from backends.sandboxes.docker.hardening import Hardening
from backends.sandboxes.docker.owners import RUN
from backends.sandboxes.local import LocalBackend
from backends.sandboxes.private import PREFIX
from orchestrator.errors import SandboxError, Unavailable
from orchestrator.testing import BACKEND_CHECKS, FAULT_CHECKS, run_check
from orchestrator.testing.harness import entered
from orchestrator.testing.leaks import children, processes
from policies.agents.replay import ReplayPolicy

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("containers")
WAIT_S = 30.0
ROLLOUT = [str(Path(sys.executable).with_name("rollout"))]


@pytest.mark.parametrize("name", BACKEND_CHECKS)
async def test_the_kit(name: str) -> None:
    await run_check(BACKEND_CHECKS[name], lambda: DockerBackend("toy"))


@pytest.mark.parametrize("name", FAULT_CHECKS)
async def test_the_kit_under_faults(name: str) -> None:
    await run_check(FAULT_CHECKS[name], lambda: DockerBackend("toy"))


@pytest.mark.parametrize("name", ["life", "interleave", "evaluate", "solutions"])
async def test_the_kit_with_bfcl(name: str) -> None:
    await run_check(BACKEND_CHECKS[name], lambda: DockerBackend("bfcl"))


async def test_the_kit_with_one_container_an_episode() -> None:
    await run_check(BACKEND_CHECKS["life"], lambda: DockerBackend("toy", per_episode=True))


async def test_same_seed_same_trajectories_as_on_the_local_backend(tmp_path: Path) -> None:
    common: dict[str, Any] = {"split": "multi_turn_base:val", "group_size": 2, "seed": 3}
    local = await play(
        tmp_path / "local", ReplayPolicy(skill=0.7), backend=LocalBackend("bfcl"), concurrency=64, **common
    )
    for name, concurrency in (("one", 1), ("many", 200)):
        played = await play(
            tmp_path / name, ReplayPolicy(skill=0.7), backend=DockerBackend("bfcl"), concurrency=concurrency, **common
        )
        assert equal(local.episodes, played.episodes)
    assert len({one.reward for one in local.episodes.values()}) > 1, "the mistakes show"


async def test_eight_hundred_known_answers(tmp_path: Path) -> None:
    played = await play(
        tmp_path / "run", ReplayPolicy(), backend=DockerBackend("bfcl"), split="multi_turn", concurrency=512
    )
    assert (played.summary.episodes, played.summary.reward_one, played.summary.duplicates) == (800, 800, 0)
    assert played.losses() == []
    assert played.summary.cpu_us_per_step_sandbox > 20, "what containers use is seen"


async def test_one_container_an_episode(tmp_path: Path) -> None:
    backend = DockerBackend("toy", per_episode=True)
    played = await play(tmp_path / "run", Counted(counting), backend=backend, episodes=8, concurrency=4, sandboxes=2)
    assert played.summary.outcomes == {"completed": 8}
    assert backend.statistics().started >= 8
    assert played.losses() == []


async def test_a_container_is_replaced_after_so_many_episodes(tmp_path: Path) -> None:
    backend = DockerBackend("toy", recycle_after=10)
    played = await play(
        tmp_path / "run", Counted(counting, think_s=0.2), backend=backend, episodes=48, concurrency=12, sandboxes=1
    )
    assert played.summary.reward_one == 48
    assert backend.statistics().started >= 3
    assert played.losses() == []
    assert played.summary.recovered_episodes == 0


async def test_a_container_near_its_memory_is_replaced(tmp_path: Path) -> None:
    def act(view: Any, ctx: Any) -> str:
        return ["memory 100", "sleep 3", "add 1", "stop"][view.turn]

    backend = DockerBackend("toy", hardening=Hardening(memory_mb=160))
    played = await play(tmp_path / "run", Counted(act), backend=backend, tasks=["toy_7"], sandboxes=1)
    assert played.summary.reward_one == 1
    assert backend.statistics().started == 2
    assert backend.statistics().oom_kills == 0


async def test_what_inspect_shows() -> None:
    """The rules of a hardened container, read from the daemon; and no secret among what everybody may read."""
    async with entered(lambda: DockerBackend("toy")) as backend:
        sandbox = await backend.create()
        [shown] = json.loads(await asyncio.to_thread(docker, "inspect", sandbox.id))
        text = json.dumps(shown)
        host, config = shown["HostConfig"], shown["Config"]
        assert config["User"] == "65534:65534"
        assert host["CapDrop"] == ["ALL"]
        assert not host["CapAdd"]
        assert "no-new-privileges" in host["SecurityOpt"]
        assert host["ReadonlyRootfs"]
        assert not host["Privileged"]
        assert host["NetworkMode"] == "none"
        assert (host["PidsLimit"], host["Memory"], host["MemorySwap"]) == (128, 2048 << 20, 2048 << 20)
        assert host["NanoCpus"] == 10**9
        assert host["Init"]
        assert host["LogConfig"]["Type"] == "none"
        assert "size=64m" in host["Tmpfs"]["/tmp"]
        [mount] = shown["Mounts"]
        assert (mount["Destination"], mount["RW"]) == ("/run/rollout", False)
        assert config["Labels"][RUN].startswith("kit")
        assert "token" not in text
        environ = await asyncio.to_thread(inside, sandbox.id, "print(open('/proc/1/environ').read())")
        assert "oken" not in environ


async def test_the_door_is_shut_behind_the_server() -> None:
    connect = "import socket; socket.socket(socket.AF_UNIX).connect('/run/rollout/orchestrator')"
    async with entered(lambda: DockerBackend("toy")) as backend:
        sandbox = await backend.create()
        assert "done" not in await asyncio.to_thread(inside, sandbox.id, f"{connect}; print('done')", check=False)


async def test_a_bound_may_be_lifted_by_name() -> None:
    hardening = Hardening(read_only=False, memory_mb=0, pids=0, tmp_mb=8, network="bridge")
    async with entered(lambda: DockerBackend("toy", hardening=hardening)) as backend:
        sandbox = await backend.create()
        [shown] = json.loads(await asyncio.to_thread(docker, "inspect", sandbox.id))
        host = shown["HostConfig"]
        assert (host["ReadonlyRootfs"], host["Memory"], host["NetworkMode"]) == (False, 0, "bridge")
        assert not host["PidsLimit"]
        assert "size=8m" in host["Tmpfs"]["/tmp"]


async def test_an_image_that_cannot_start_is_told() -> None:
    async with entered(lambda: DockerBackend("toy", hardening=Hardening(runtime="no-such-runtime"))) as backend:
        with pytest.raises(SandboxError, match="no-such-runtime"):
            await backend.create()


async def test_a_stale_image_is_noticed() -> None:
    name = "rollout-test-stale:1"
    program = (
        f"FROM {DockerBackend('toy').spec.name and 'scratch'}\nLABEL rollout.environment=toy rollout.digest=0123\n"
    )
    await asyncio.to_thread(
        subprocess.run,
        ["docker", "build", "-q", "-t", name, "-"],
        input=program.encode(),
        check=True,
        capture_output=True,
    )
    try:
        with pytest.raises(Unavailable, match=r"stale.*rollout image build toy"):
            async with entered(lambda: DockerBackend("toy", image=name)):
                pass
    finally:
        await asyncio.to_thread(docker, "rmi", name)


async def test_without_a_daemon_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    with pytest.raises(Unavailable, match="start it"):
        async with DockerBackend("toy"):
            pass
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:2375")
    with pytest.raises(Unavailable, match="another machine"):
        async with DockerBackend("toy"):
            pass


def test_the_benchmark(tmp_path: Path) -> None:
    command = [*ROLLOUT, "bench", "docker", "--episodes", "200", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("steps_ratio", "cpu_ratio", "warm_lease_p99_ms", "cold_start_ratio", "starts_per_s"):
        assert found[name] > 0
    assert 10 < found["mib_per_container"] < 200
    assert (tmp_path / "bench-results" / "docker.png").is_file()


class TestKilled:
    """kill -9 of an orchestrator that nobody restarts: nothing of it is left, nothing of anybody else is touched."""

    @pytest.fixture
    def runs(self, tmp_path: Path, private_folder: Path) -> Iterator[Runs]:
        with Runs(tmp_path, private_folder) as runs:
            yield runs

    @pytest.mark.parametrize("after_s", [0.4, 1.2, 4.0])
    def test_nothing_is_left(self, after_s: float, runs: Runs) -> None:
        other = runs.start("other")
        others = runs.wait_for_containers(3)
        theirs = runs.all()
        killed = runs.start("killed")
        time.sleep(after_s)
        killed.kill()
        killed.wait()
        assert runs.left(theirs) == []
        assert set(mine()) >= others
        assert other.poll() is None, "a run of another live owner is untouched"

    def test_a_dead_reaper_is_made_up_for(self, runs: Runs) -> None:
        killed = runs.start("killed")
        left = runs.wait_for_containers(3)
        [reaper] = runs.reapers(killed)
        os.kill(killed.pid, signal.SIGSTOP)  # else it would start another one
        os.kill(reaper, signal.SIGKILL)
        killed.kill()
        killed.wait()
        assert set(mine()) >= left
        shown = subprocess.run([*ROLLOUT, "reap", "--dry-run"], capture_output=True, text=True, check=True).stdout
        assert all(f"would remove {name}" in shown for name in left)
        done = subprocess.run([*ROLLOUT, "reap"], capture_output=True, text=True, check=True).stdout
        assert all(f"removed {name}" in done for name in left)
        assert not left & set(mine())

    def test_the_next_run_clears_what_is_left(self, runs: Runs) -> None:
        killed = runs.start("killed")
        left = runs.wait_for_containers(3)
        [reaper] = runs.reapers(killed)
        os.kill(killed.pid, signal.SIGSTOP)
        os.kill(reaper, signal.SIGKILL)
        killed.kill()
        killed.wait()
        runs.start("next")
        ends = time.monotonic() + WAIT_S
        while left & set(mine()) and time.monotonic() < ends:
            time.sleep(0.1)
        assert not left & set(mine())

    def test_a_killed_reaper_is_replaced(self, runs: Runs) -> None:
        run = runs.start("run")
        runs.wait_for_containers(1)
        [reaper] = runs.reapers(run)
        os.kill(reaper, signal.SIGKILL)
        ends = time.monotonic() + WAIT_S
        while runs.reapers(run) in ([], [reaper]) and time.monotonic() < ends:
            time.sleep(0.1)
        assert len(runs.reapers(run)) == 1


class Runs:
    """Runs of the command, whose every step takes seconds; killed at the end, and what they leave waited for."""

    def __init__(self, folder: Path, private: Path) -> None:
        self._folder = folder
        self._private = private
        self._started: list[subprocess.Popen[bytes]] = []
        self._before = self.all()
        self._script = folder / "slow.py"
        text = "import asyncio\n\nasync def act(view, ctx):\n    await asyncio.sleep(5)\n    return 'add 0'\n"
        self._script.write_text(text, encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._started:
            process.kill()
            process.wait()
        assert self.left(self._before) == []

    def start(self, name: str) -> subprocess.Popen[bytes]:
        arguments = ["collect", "--env", "toy", "--backend", "docker", "--policy", "scripted", "--no-install"]
        arguments += ["--script", f"{self._script}:act", "--out", str(self._folder / name), "--sandboxes", "3"]
        with (self._folder / f"{name}.out").open("wb") as output:
            process = subprocess.Popen([*ROLLOUT, *arguments], stdout=output, stderr=output)
        self._started.append(process)
        return process

    def all(self) -> set[str]:
        """Containers, private folders and reapers of anybody's."""
        reapers = {str(process.pid) for process in processes() if "docker.reaper" in process.command}
        return {*mine(), *map(str, self._private.glob(f"{PREFIX}*")), *reapers}

    def left(self, others: set[str]) -> list[str]:
        """What there is besides `others`, once 30 s have passed or there is nothing."""
        ends = time.monotonic() + WAIT_S
        while (left := self.all() - others) and time.monotonic() < ends:
            time.sleep(0.2)
        return sorted(left)

    def wait_for_containers(self, count: int) -> set[str]:
        """The first containers of runs that this object has started."""
        ends = time.monotonic() + WAIT_S
        while len(found := set(mine()) - self._before) < count:
            assert time.monotonic() < ends, f"only {found}"
            time.sleep(0.1)
        return found

    def reapers(self, process: subprocess.Popen[bytes]) -> list[int]:
        return [child.pid for child in children(process.pid) if "docker.reaper" in child.command]
