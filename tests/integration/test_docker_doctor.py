"""What `rollout doctor` and `rollout reap` find beside live containers, and what they advise."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from backends.environments.catalog import find
from backends.sandboxes.docker import DockerBackend
from backends.sandboxes.docker.base import add_bytes
from backends.sandboxes.docker.images import DIGEST, ENVIRONMENT, image_name
from backends.sandboxes.docker.port import Engine
from bench.strikes import docker
from orchestrator.cli.doctor import left_over_servers
from orchestrator.testing.harness import entered

ROLLOUT = [str(Path(sys.executable).with_name("rollout"))]


def processes_of(container: str) -> set[int]:
    """Their numbers on this machine."""
    return {int(line) for line in docker("top", container, "-eo", "pid").split()[1:]}


@pytest.mark.usefixtures("containers")
async def test_the_servers_of_live_containers_are_nobodys_leftovers() -> None:
    """Their parent on this machine is no Python, and their command line is a server's."""
    async with entered(lambda: DockerBackend("toy")) as backend:
        sandbox = await backend.create()
        theirs = await asyncio.to_thread(processes_of, sandbox.id)
        assert len(theirs) >= 2
        assert not theirs & set(await asyncio.to_thread(lambda: list(left_over_servers(Path("/proc")))))


def test_a_server_whose_orchestrator_is_gone_is_one(tmp_path: Path) -> None:
    processes = {
        1: ("init", 0, "pid:[1]", "/sbin/init"),
        7: ("python", 1, "pid:[1]", "python -m backends.server --environment toy"),
        8: ("python", 9, "pid:[1]", "python -m backends.server --environment toy"),
        9: ("python3", 1, "pid:[1]", "python -m orchestrator"),
        20: ("docker-init", 1, "pid:[2]", "docker-init -- python -m backends.server"),
        21: ("python", 20, "pid:[2]", "python -m backends.server"),
    }
    (tmp_path / "self").symlink_to("9")
    for pid, (name, parent, namespace, command) in processes.items():
        folder = tmp_path / str(pid)
        (folder / "ns").mkdir(parents=True)
        (folder / "ns" / "pid").symlink_to(namespace)
        (folder / "comm").write_text(f"{name}\n", encoding="ascii")
        (folder / "stat").write_text(f"{pid} ({name}) S {parent} 1", encoding="ascii")
        (folder / "cmdline").write_bytes(command.replace(" ", "\0").encode())
    assert list(left_over_servers(tmp_path)) == [7]


@pytest.mark.usefixtures("containers")
async def test_a_stale_image_is_named_so_that_docker_understands() -> None:
    """Also one that has lost its name to a newer one."""
    names = ["rollout-test-old:1", "rollout-test-older:1"]
    toy = await asyncio.to_thread(lambda: image_name(find("toy")))
    async with await Engine.connect() as engine:
        for name in names:
            context = io.BytesIO()
            with tarfile.open(fileobj=context, mode="w") as tar:
                add_bytes(tar, "Dockerfile", f"FROM {toy}\nLABEL rollout.test={name}\n".encode())
            context.seek(0)
            labels = {ENVIRONMENT: "toy", DIGEST: f"old {os.getpid()}"}
            await engine.build(context, lambda step: None, tag=name, labels=labels, arguments={})
        lost = (await asyncio.to_thread(docker, "images", "-q", names[1])).strip()
        await asyncio.to_thread(docker, "tag", names[0], names[1])
        try:
            done = await asyncio.to_thread(
                subprocess.run, [*ROLLOUT, "doctor", "--json"], capture_output=True, check=True
            )
            said = {check["what"]: check["finding"] for check in json.loads(done.stdout.splitlines()[-1])["checks"]}
            advice = said["image toy"].partition("`docker rmi ")[2].partition("`")[0].split()
            assert {*names, lost} <= set(advice)
            assert not any("none" in word for word in advice)
        finally:
            await asyncio.to_thread(docker, "rmi", *names, lost)


def test_reap_without_a_daemon_says_so() -> None:
    environ = os.environ | {"DOCKER_HOST": "unix:///nowhere.sock"}
    done = subprocess.run([*ROLLOUT, "reap", "--json"], capture_output=True, text=True, env=environ, check=True)
    assert json.loads(done.stdout)["looked_at_containers"] is False
    assert "no containers looked at: there is no Docker daemon at /nowhere.sock" in done.stderr
