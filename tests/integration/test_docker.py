"""The Docker backend on a real daemon: its contract, whole runs, what inspect shows, what is left behind."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from containers import mine
from runs import Counted, counting, equal, play

from backends.environments.catalog import find
from backends.sandboxes.docker import DockerBackend
from backends.sandboxes.docker.base import add_bytes
from backends.sandboxes.docker.hardening import Hardening
from backends.sandboxes.docker.images import image_name
from backends.sandboxes.docker.owners import RUN
from backends.sandboxes.docker.port import Engine, EngineRefused
from backends.sandboxes.local import LocalBackend
from backends.sandboxes.private import PREFIX
from bench.owners_killed import heirs
from bench.strikes import FAULTS, docker, inside
from orchestrator.cli.config import Docker, load
from orchestrator.errors import SandboxError, Unavailable, UsageError
from orchestrator.testing import BACKEND_CHECKS, FAULT_CHECKS, run_check
from orchestrator.testing.harness import entered
from orchestrator.testing.harness import play as exchange
from orchestrator.testing.leaks import children
from policies.agents.replay import ReplayPolicy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.daemon import PrivateDaemon

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
        assert (host["IpcMode"], host["CgroupnsMode"]) == ("private", "private")
        assert {one["Name"]: (one["Soft"], one["Hard"]) for one in host["Ulimits"]} == {
            "nofile": (1024, 1024), "core": (0, 0)
        }  # fmt: skip
        assert config["StdinOnce"], "what it reads ends with whoever started it"
        assert "PYTHONHASHSEED=0" in config["Env"], "the order of sets is the same in every server"
        assert host["LogConfig"]["Type"] == "none"
        assert "size=64m" in host["Tmpfs"]["/tmp"]
        [mount] = shown["Mounts"]
        assert (mount["Destination"], mount["RW"]) == ("/run/rollout", False)
        assert config["Labels"][RUN].startswith("kit")
        assert "token" not in text
        environ = await asyncio.to_thread(inside, sandbox.id, "print(open('/proc/1/environ').read())")
        assert "oken" not in environ


async def test_many_may_remove_the_same_container() -> None:
    """The daemon refuses all but the first while that goes on: each waits until it is gone."""
    async with entered(lambda: DockerBackend("toy")) as backend:
        sandbox = await backend.create()
        async with await Engine.connect() as engine, asyncio.TaskGroup() as tasks:
            for _ in range(5):
                tasks.create_task(engine.remove(sandbox.id))
        assert sandbox.id not in await asyncio.to_thread(docker, "ps", "-a", "--format", "{{.Names}}")


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


async def test_a_container_that_cannot_start_is_told() -> None:
    async with entered(lambda: DockerBackend("toy", hardening=Hardening(network="no-such-network"))) as backend:
        with pytest.raises(SandboxError, match="no-such-network"):
            await backend.create()


@pytest.mark.parametrize(
    ("runtime", "says"),
    [
        ("no-such-runtime", r"no runtime 'no-such-runtime' \(it has .*runc.*daemon\.json"),
        ("runsc", "install gVisor .*`runsc install`"),
    ],
)
async def test_a_runtime_that_is_not_there(runtime: str, says: str) -> None:
    async with await Engine.connect() as engine:
        if runtime in (await engine.info())["Runtimes"]:
            pytest.skip(f"{runtime} is there")
    with pytest.raises(Unavailable, match=says):
        async with DockerBackend("toy", hardening=Hardening(runtime=runtime)):
            pass


async def test_a_runtime_that_is_there() -> None:
    async with entered(lambda: DockerBackend("toy", hardening=Hardening(runtime="runc"))) as backend:
        await exchange(await backend.create(), "toy_1", seed=1)


def test_items_are_switched_by_name_on_the_command_line(tmp_path: Path) -> None:
    arguments = ["--env", "toy", "--backend", "docker", "--episodes", "2", "--sandboxes", "1", "--out", "run", "--json"]
    switched = ["user=1000:1000", "memory_mb=300", "read_only=false", "egress=example.org:443,files.example.org:443"]
    for item in switched:
        arguments += ["--hardening", item]
    done = subprocess.run([*ROLLOUT, "collect", *arguments], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    stored = load(None, {"env": "toy", "backend": "docker", "hardening": tuple(switched)}).backend
    assert stored == Docker(
        kind="docker",
        hardening=Hardening(
            user="1000:1000", memory_mb=300, read_only=False, egress=("example.org:443", "files.example.org:443")
        ),
    )


async def test_what_the_statistics_say() -> None:
    backend = DockerBackend("toy")
    async with entered(lambda: backend):
        sandbox = await backend.create()
        await exchange(sandbox, "toy_1", seed=1)
        found = backend.statistics()
        assert (found.containers, found.left, found.started) == (1, 0, 1)
        assert 5 << 20 < found.memory_bytes < 200 << 20
        assert found.cpu_seconds > 0.05
        assert (found.oom_kills, found.egress_refused) == (0, 0)
        assert found.host.cores == os.cpu_count()
        assert 0 < found.host.available_bytes < found.host.memory_bytes


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


async def test_a_build_that_fails_says_why_and_leaves_no_container() -> None:
    mark = f"odd-{os.getpid()}"
    program = f"import sys; print('\\x1b[91mno such thing\\x1b[0m'); sys.exit('{mark}')"
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        run = json.dumps(["/opt/rollout/venv/bin/python", "-c", program])
        add_bytes(tar, "Dockerfile", f"FROM {image_name(find('toy'))}\nRUN {run}\n".encode())
    context.seek(0)
    async with await Engine.connect() as engine:
        with pytest.raises(EngineRefused) as caught:
            await engine.build(context, lambda step: None, tag="rollout-test-odd:1", labels={}, arguments={})
    assert "    no such thing\n" in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert mark not in await asyncio.to_thread(docker, "ps", "-a", "--no-trunc", "--format", "{{.Command}}")


async def test_without_a_daemon_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    with pytest.raises(Unavailable, match=r"no Docker daemon at /nowhere\.sock: start it"):
        async with DockerBackend("toy"):
            pass
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "d"))
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/d")
        with pytest.raises(Unavailable, match=f"daemon at {tmp_path}/d does not answer"):
            async with DockerBackend("toy"):
                pass
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    with pytest.raises(Unavailable, match=r"daemon at tcp://127\.0\.0\.1:1 does not answer .*DOCKER_TLS_VERIFY"):
        async with DockerBackend("toy"):
            pass


async def test_where_to_dial_in_is_asked_for_another_machines_daemon_alone() -> None:
    for options in ({"host": "192.0.2.1"}, {"port": 7000}, {"insecure": True}):
        with pytest.raises(UsageError, match="without a network: leave out --listen and --insecure"):
            async with DockerBackend("toy", **options):
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


def test_the_benchmark_of_faults(tmp_path: Path) -> None:
    command = [*ROLLOUT, "bench", "docker-faults", "--episodes", "20", "--kills", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=115, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["episodes_right"] == found["episodes"] == 140
    assert found["strikes"] == dict.fromkeys(FAULTS, 2)
    assert set(found["detection_max_s"]) == {"kill", "oom", "pause", "hang"}
    assert max(found["detection_max_s"].values()) < 5
    for name in ("untrue_causes", "infra_rewards", "duplicates", "repeated_calls", "left_after_30s"):
        assert found[name] == 0
    assert (found["owners_killed"], found["other_owner_hurt"]) == (1, 0)
    assert 0 < found["restart_recovery_s"] < 10
    assert (tmp_path / "bench-results" / "docker-faults.png").is_file()


def test_an_empty_daemon_needs_no_other_command(empty_daemon: PrivateDaemon, tmp_path: Path) -> None:
    """The base image is made from this Python, the environment's is built on it, and said so."""
    command = [*ROLLOUT, "collect", "--env", "toy", "--backend", "docker", "--episodes", "4", "--out", "run", "--json"]
    environ = os.environ | {"DOCKER_HOST": empty_daemon.url}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environ, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["reward_one"] == 4
    assert "built rollout-toy:" in done.stderr
    images = docker("images", "--format", "{{.Repository}}", host=empty_daemon.url)
    assert {"rollout-toy", "rollout-base"} <= set(images.split())
    assert docker("ps", "-aq", host=empty_daemon.url) == ""


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
        assert runs.containers() >= others
        assert other.poll() is None, "a run of another live owner is untouched"

    def test_a_dead_reaper_is_made_up_for(self, runs: Runs) -> None:
        killed = runs.start("killed")
        left = runs.wait_for_containers(3)
        [reaper] = runs.reapers(killed)
        os.kill(killed.pid, signal.SIGSTOP)  # else it would start another one
        os.kill(reaper, signal.SIGKILL)
        killed.kill()
        killed.wait()
        shown = subprocess.run([*ROLLOUT, "reap", "--dry-run"], capture_output=True, text=True, check=True).stdout
        still = left & runs.containers()  # any run that begins on this daemon clears them too
        assert all(f"would remove {name}" in shown for name in still)
        subprocess.run([*ROLLOUT, "reap"], capture_output=True, text=True, check=True)
        assert not left & runs.containers()

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
        while left & runs.containers() and time.monotonic() < ends:
            time.sleep(0.1)
        assert not left & runs.containers()

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
        """Containers, private folders, and processes that inherited the folder of folders: the reapers."""
        heirs_ = {f"process {pid}" for pid in heirs(self._private, os.getpid())}
        runs = {f"process {process.pid}" for process in self._started if process.poll() is None}
        return {*self.containers(), *map(str, self._private.glob(f"{PREFIX}*")), *(heirs_ - runs)}

    def containers(self) -> set[str]:
        """Containers of this process, of its runs, and of nobody."""
        return set(mine(*(process.pid for process in self._started)))

    def left(self, others: set[str]) -> list[str]:
        """What there is besides `others`, once 30 s have passed or there is nothing."""
        ends = time.monotonic() + WAIT_S
        while (left := self.all() - others) and time.monotonic() < ends:
            time.sleep(0.2)
        return sorted(left)

    def wait_for_containers(self, count: int) -> set[str]:
        """The first containers of runs that this object has started."""
        ends = time.monotonic() + WAIT_S
        while len(found := self.containers() - self._before) < count:
            assert time.monotonic() < ends, f"only {found}"
            time.sleep(0.1)
        return found

    def reapers(self, process: subprocess.Popen[bytes]) -> list[int]:
        return [child.pid for child in children(process.pid) if "docker.reaper" in child.command]
