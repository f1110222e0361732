"""The Docker backend on another machine's daemon, reached over TCP with TLS: its contract, whole runs, its walls."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from elsewhere import ROLLOUT
from runs import Counted, counting, equal, play, until

from backends.environments.catalog import find
from backends.environments.data import register
from backends.sandboxes.docker import DockerBackend, outpost
from backends.sandboxes.docker.hardening import Hardening
from backends.sandboxes.docker.owners import LEASE
from backends.sandboxes.docker.port import EngineGone
from backends.sandboxes.docker.service_backend import ServiceImageBackend
from backends.sandboxes.docker.service_image import ServiceImage
from backends.sandboxes.local import LocalBackend
from bench.strikes import docker, inside
from orchestrator.errors import Unavailable, UsageError
from orchestrator.testing import BACKEND_CHECKS, FAULT_CHECKS, run_check
from orchestrator.testing.harness import entered
from orchestrator.testing.harness import play as exchange
from policies.agents.replay import ReplayPolicy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from elsewhere import Elsewhere

    from backends.sandboxes.docker.port import Step

NOTICED_S = 8.0
"""A machine that is silent is known to have gone after four seconds; this one may be busy."""


@pytest.mark.parametrize("name", [*BACKEND_CHECKS, "crash", "hang_in_c", "oversized", "memory"])
async def test_the_kit(name: str, far: Elsewhere) -> None:
    """The first of them finds no image there: it is built through the daemon's API."""
    await run_check({**BACKEND_CHECKS, **FAULT_CHECKS}[name], lambda: DockerBackend("toy"))


async def test_a_sandbox_that_is_killed_there_is_told(far: Elsewhere) -> None:
    async with entered(lambda: DockerBackend("toy")) as backend:
        sandbox = await backend.create()
        await asyncio.to_thread(docker, "kill", sandbox.id, host=far.daemon.url)
        async with asyncio.timeout(NOTICED_S):
            assert "SIGKILL" in (await asyncio.shield(sandbox.lost)).message


async def test_forty_known_answers(far: Elsewhere, tmp_path: Path) -> None:
    common: dict[str, Any] = {"split": "multi_turn_base", "episodes": 40, "seed": 3}
    played = await play(tmp_path / "far", ReplayPolicy(), backend=DockerBackend("bfcl"), **common)
    assert (played.summary.episodes, played.summary.reward_one, played.summary.duplicates) == (40, 40, 0)
    assert played.losses() == []
    local = await play(tmp_path / "local", ReplayPolicy(), backend=LocalBackend("bfcl"), **common)
    assert equal(local.episodes, played.episodes)


async def test_what_inspect_shows(far: Elsewhere) -> None:
    """The sandbox is walled off as at home; the outpost has a network and nothing else; neither shows a token."""
    async with entered(lambda: DockerBackend("toy")) as backend:
        sandbox = await backend.create()
        [post] = await asyncio.to_thread(far.containers, "--filter", f"label={LEASE}", "--filter", "name=outpost")
        shown = await asyncio.to_thread(docker, "inspect", sandbox.id, post, host=far.daemon.url)
        one, other = json.loads(shown)
        assert (one["HostConfig"]["NetworkMode"], other["HostConfig"]["NetworkMode"]) == ("none", "bridge")
        assert {one["Config"]["Labels"][LEASE], other["Config"]["Labels"][LEASE]} == {post}
        for container in (one, other):
            host = container["HostConfig"]
            assert (container["Config"]["User"], host["CapDrop"], host["ReadonlyRootfs"]) == (
                "65534:65534",
                ["ALL"],
                True,
            )
            assert (host["Privileged"], host["PortBindings"] or {}) == (False, {})
        [mount] = one["Mounts"]
        assert (mount["Destination"], mount["RW"]) == ("/run/rollout", False)
        assert "oken" not in json.dumps(one)
        for name in (sandbox.id, post):
            program = "print(open('/proc/1/environ').read())"
            assert "oken" not in await asyncio.to_thread(inside, name, program, host=far.daemon.url)


async def test_the_door_is_shut_behind_the_server(far: Elsewhere) -> None:
    connect = "import socket; socket.socket(socket.AF_UNIX).connect('/run/rollout/orchestrator')"
    async with entered(lambda: DockerBackend("toy")) as backend:
        sandbox = await backend.create()
        said = await asyncio.to_thread(
            inside, sandbox.id, f"{connect}; print('done')", host=far.daemon.url, check=False
        )
        assert "done" not in said


async def test_insecure_means_no_tls(far: Elsewhere) -> None:
    backend = DockerBackend("toy", insecure=True, host=far.here)
    async with entered(lambda: backend):
        assert backend._listener.url.startswith(f"http://{far.here}:")
        await exchange(await backend.create(), "toy_1", seed=1)


class KilledOutpost:
    """Ends the outpost of a backend as soon as it is entered."""

    def __init__(self, far: Elsewhere) -> None:
        self._far = far

    async def __aenter__(self) -> None:
        [post] = await asyncio.to_thread(self._far.containers, "--filter", "name=outpost")
        await asyncio.to_thread(docker, "kill", post, host=self._far.daemon.url)

    async def __aexit__(self, *exc: object) -> None:
        pass


async def test_an_outpost_that_dies_costs_no_model_call(far: Elsewhere, tmp_path: Path) -> None:
    policy = Counted(counting, think_s=0.3)
    backend = DockerBackend("toy")
    played = await play(
        tmp_path / "run", policy, backend=backend, episodes=16, concurrency=8, chaos=KilledOutpost(far), all_up=True
    )
    assert played.summary.reward_one == 16
    assert len(played.losses()) == 2
    assert backend.statistics().started == 4
    assert policy.repeated() == 0


async def test_an_outpost_that_could_not_be_removed_is_removed_in_the_end(
    far: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the daemon is just restarting while the next outpost takes its place; no volume of either stays."""
    backend = DockerBackend("toy")
    async with entered(lambda: backend):
        [post] = await asyncio.to_thread(far.containers)
        await asyncio.to_thread(docker, "kill", post, host=far.daemon.url)

        async def it_has_ended() -> bool:
            return backend._outposts is not None and (post := backend._outposts._current) is not None and post.ended

        await until(it_has_ended, "the end of the outpost to be heard of")
        with monkeypatch.context() as patch:
            patch.setattr(backend.engine, "remove", _gone)
            await backend.create()
        assert len(await asyncio.to_thread(far.containers)) == 3
    assert await asyncio.to_thread(far.containers) == []
    assert await asyncio.to_thread(docker, "volume", "ls", "--quiet", host=far.daemon.url) == ""


async def _gone(container: str, **options: object) -> None:
    raise EngineGone(f"remove container {container}: the daemon is restarting")


async def test_a_network_that_goes_is_noticed(far: Elsewhere) -> None:
    async with entered(lambda: DockerBackend("toy")) as backend:
        sandbox = await backend.create()
        with far.cut():
            cut = time.monotonic()
            async with asyncio.timeout(2 * NOTICED_S):
                await asyncio.shield(sandbox.lost)
            assert time.monotonic() - cut < NOTICED_S
        await backend.destroy(sandbox.id)
        await exchange(await backend.create(), "toy_1", seed=1)


async def test_containers_that_do_not_find_back_are_told(far: Elsewhere) -> None:
    with pytest.raises(
        Unavailable, match=rf"do not reach this machine at https://{far.here}:\d+/ \(.+\): say with --l"
    ):
        async with DockerBackend("toy", outpost_network="none"):
            pass
    with pytest.raises(Unavailable, match=r"cannot start the outpost.*it needs the network 'nowhere', so start it"):
        async with DockerBackend("toy", outpost_network="nowhere"):
            pass


async def test_an_outpost_that_cannot_run_says_why(
    far: Elsewhere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program.py"
    program.write_text("raise SystemExit('no luck today')", encoding="utf-8")
    monkeypatch.setattr(outpost, "_PROGRAM", program)
    with pytest.raises(Unavailable, match="-outpost-1 has ended: no luck today"):
        async with DockerBackend("toy"):
            pass


async def test_registered_data_are_sent_along(far: Elsewhere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: an image that carries these data over this image is found again."""
    monkeypatch.setenv("ROLLOUT_HOME", str(tmp_path / "home"))
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n', encoding="utf-8")
    await asyncio.to_thread(register, find("gsm8k"), tmp_path, tmp_path / "home" / "data", lambda line: None)
    steps: list[Step] = []
    for _ in range(2):
        async with entered(lambda: DockerBackend("gsm8k", progress=steps.append)) as backend:
            sandbox = await backend.create()
            assert len((await sandbox.tasks("gsm8k:test")).ids) == 1
            program = "import os; print(os.access('/data', os.W_OK), open('/data/test.jsonl').read())"
            said = await asyncio.to_thread(inside, sandbox.id, program, host=far.daemon.url)
            assert said.startswith('False {"question": "1 + 1?"')
    assert sum("sending its data" in step.text for step in steps) == 1


async def test_what_it_cannot_do_there(far: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="proxy of the item `egress` runs on this machine"):
        async with DockerBackend("toy", hardening=Hardening(egress=("example.org:443",))):
            pass
    with pytest.raises(UsageError, match=r"needs a Docker daemon on this machine.*--backend remote"):
        async with ServiceImageBackend("toy", ServiceImage("of-somebody:1")):
            pass
    monkeypatch.delenv("DOCKER_TLS_VERIFY")
    with pytest.raises(Unavailable, match=r"does not answer.*DOCKER_TLS_VERIFY=1"):
        async with DockerBackend("toy"):
            pass


async def test_without_tls(far: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can read the network could read along; loopback nobody reads, and nobody finds back by it."""
    monkeypatch.delenv("DOCKER_TLS_VERIFY")
    async with forwarded(far.here, far.daemon.socket) as port:
        monkeypatch.setenv("DOCKER_HOST", f"tcp://{far.here}:{port}")
        with pytest.raises(UsageError, match=r"without TLS, so that others can read tokens and steps.*--insecure"):
            async with DockerBackend("toy"):
                pass
        said = await asyncio.to_thread(doctor)
        assert said["docker"].endswith("; without TLS: set DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH")
    async with forwarded("127.0.0.1", far.daemon.socket) as port:
        monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{port}")
        with pytest.raises(Unavailable, match="find nobody: say with --listen HOST"):
            async with DockerBackend("toy"):
                pass
        async with entered(lambda: DockerBackend("toy", host=far.here)) as backend:
            await exchange(await backend.create(), "toy_1", seed=1)


@asynccontextmanager
async def forwarded(host: str, socket: Path) -> AsyncIterator[int]:
    """The port of `host` that leads to a daemon's socket, as `ssh -L` lays it."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def lead(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(socket)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(carry(reader, inner_writer))
            tasks.create_task(carry(inner_reader, writer))

    server = await asyncio.start_server(lead, host, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def doctor() -> dict[str, str]:
    """What `rollout doctor` finds."""
    done = subprocess.run([ROLLOUT, "doctor", "--json"], capture_output=True, timeout=60, check=True)
    return {check["what"]: check["finding"] for check in json.loads(done.stdout.splitlines()[-1])["checks"]}


def test_the_command(far: Elsewhere, tmp_path: Path) -> None:
    command = [ROLLOUT, "collect", "--env", "toy", "--backend", "docker", "--episodes", "4", "--json", "--out", "run"]
    command += ["--listen", far.here]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["reward_one"] == 4
    said = doctor()
    assert f" at {far.url}, " in said["docker"]
    assert said["left-over containers"].startswith("none")
    assert "inotify" not in said, "this machine's bounds are not that one's"
