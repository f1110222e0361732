"""The command over a Ray cluster: what a user types, sees and gets; signals, and a resume over other shards."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from runs import until

from backends.environments.catalog import home
from orchestrator.testing.leaks import processes

if TYPE_CHECKING:
    from ray_cluster import TwoNodes

pytestmark = pytest.mark.timeout(150)
ROLLOUT = str(Path(sys.executable).with_name("rollout"))
POLICY = """
import os
import asyncio
import beside

async def act(view, ctx):
    await asyncio.sleep(0.2)
    beside.note(f"{ctx.key} {ctx.attempt} {view.turn}\\n")
    return "stop" if view.turn >= 15 else "add 1"
"""
BESIDE = """
import os

def note(line):
    file = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(file, line.encode())
    os.close(file)
"""


class Typed:
    """What a user types in an empty folder, with a policy that uses a module of their own."""

    def __init__(self, folder: Path, address: str) -> None:
        self.log = folder / "decisions"
        self.out = folder / "run"
        self._variables = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(folder)}
        (folder / "policy.py").write_text(POLICY, encoding="utf-8")
        (folder / "beside.py").write_text(f"LOG = {str(self.log)!r}\n{BESIDE}", encoding="utf-8")
        self.script = f"{folder}/policy.py:act"

    async def begin(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(ROLLOUT, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self._variables
        )

    async def collect(self, *arguments: str) -> asyncio.subprocess.Process:
        options = ["--env", "toy", "--policy", "scripted", "--script", self.script, "--out", str(self.out), "--json"]
        options += ["--durability", "step", "--episodes", "120", "--concurrency", "40", "--ray-cpus", "0.1"]
        return await self.begin("collect", *options, *arguments)

    async def deciding(self, lines: int) -> None:
        async def there() -> bool:
            return len(self.decisions()) > lines

        await until(there, "decisions", 60)

    def decisions(self) -> list[str]:
        return self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []

    def again(self) -> dict[str, int]:
        return {line: count for line, count in Counter(self.decisions()).items() if count > 1}


def last(output: bytes) -> dict[str, Any]:
    """The one line of stdout."""
    (line,) = output.splitlines()
    read: dict[str, Any] = orjson.loads(line)
    return read


def clean(errors: bytes) -> None:
    """Nothing but sentences of ours is on stderr: no traceback, no line of Ray's logs."""
    for line in errors.decode().splitlines():
        assert not line.startswith(("Traceback", "[20", "20", "***", "PC:", "    @", "(raylet)")), errors.decode()


async def test_a_run_is_cancelled_and_goes_on_over_fewer_shards_and_repeats_nothing(
    cluster: TwoNodes, tmp_path: Path
) -> None:
    typed = Typed(tmp_path, cluster.address)
    first = await typed.collect("--shards", "2")
    await typed.deciding(200)
    for _ in range(2):
        first.send_signal(signal.SIGINT)
        await asyncio.sleep(0.5)  # two signals at once are one
    output, errors = await first.communicate()
    clean(errors)
    assert first.returncode == 130
    assert last(output)["state"] == "unfinished"
    again = await typed.begin("resume", str(typed.out), "--shards", "1", "--json")
    output, errors = await again.communicate()
    clean(errors)
    summary = last(output)
    assert (again.returncode, summary["outcomes"], summary["lives"]) == (0, {"completed": 120}, 2)
    assert (summary["attempts_lost"], summary["duplicates"], typed.again()) == (0, 0, {})
    assert not (home() / "shards" / summary["run"]).exists()


async def test_a_run_goes_on_over_shards_that_began_without_any(cluster: TwoNodes, tmp_path: Path) -> None:
    typed = Typed(tmp_path, cluster.address)
    collect = ["--env", "toy", "--policy", "scripted", "--script", typed.script, "--out", str(typed.out)]
    first = await typed.begin("collect", *collect, "--durability", "step", "--episodes", "60", "--concurrency", "30")
    await typed.deciding(150)
    first.kill()
    await first.communicate()
    again = await typed.begin("resume", str(typed.out), "--shards", "2", "--json")
    output, errors = await again.communicate()
    clean(errors)
    summary = last(output)
    assert (again.returncode, summary["outcomes"], summary["lives"]) == (0, {"completed": 60}, 2)
    assert len(typed.again()) <= 30  # of each that was under way, the one decision that the journal may not have


async def test_sigterm_drains(cluster: TwoNodes, tmp_path: Path) -> None:
    typed = Typed(tmp_path, cluster.address)
    run = await typed.collect("--backend", "ray", "--sandboxes", "2")
    await typed.deciding(100)
    run.terminate()
    output, errors = await run.communicate()
    clean(errors)
    summary = last(output)
    assert run.returncode == 3
    assert summary["episodes"] >= 40
    assert summary["outcomes"] == {"completed": summary["episodes"]}
    assert not [one for one in processes() if f"--run {summary['run']}" in one.command]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shards", "1", "--ray-label", "a b=c"), "Ray refuses what is asked for: Invalid label key"),
        (("--backend", "ray", "--ray-runtime-env", "pip=5"), "Ray refuses what is asked for: runtime_env['pip']"),
        (("--shards", "1", "--ray-address", "ray://127.0.0.1:10001"), "is not the address of a cluster's head"),
        (("--backend", "ray", "--ray-address", "http://127.0.0.1:8265"), "is not the address of a cluster's head"),
    ],
)
async def test_what_cannot_be_is_refused_at_once_and_leaves_no_run(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    typed = Typed(tmp_path, "127.0.0.1:1")
    run = await typed.collect(*arguments)
    output, errors = await run.communicate()
    assert (run.returncode, output) == (2, b"")
    assert said in errors.decode()
    assert len(errors.splitlines()) == 1
    assert not typed.out.exists()


async def test_a_cluster_without_room_is_said_to_have_none(cluster: TwoNodes, tmp_path: Path) -> None:
    typed = Typed(tmp_path, cluster.address)
    run = await typed.collect("--shards", "1", "--ray-cpus", "3")
    assert run.stderr is not None, "a pipe was asked for"
    async with asyncio.timeout(30):
        async for line in run.stderr:
            if line.startswith(b"shard 0: "):
                break
    assert line.decode().startswith(
        "shard 0: it waits for a node: it asks for 3 CPUs; the cluster has 4 CPUs on 2 nodes"
    )
    run.terminate()
    await run.communicate()
    assert run.returncode == 130
