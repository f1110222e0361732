"""What `rollout doctor` says of Ray: against a real cluster with tokens, and of clusters that are not there."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from importlib import metadata
from typing import TYPE_CHECKING, NoReturn

import pytest
from ray_head import free_port, ray_head

from backends.sandboxes.ray import cluster, probe
from orchestrator.cli.checks import FAIL, OK, WARN, Check
from orchestrator.cli.doctor_ray import look_at_ray
from orchestrator.errors import RunFailed, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOKEN = "5" * 64
OTHERS = """
import json, sys, ray
from ray.experimental import internal_kv
ray.init(address=sys.argv[1], log_to_driver=False)
known = json.loads(internal_kv._internal_kv_get(b"CLUSTER_METADATA", namespace=b"cluster"))
other = json.dumps({**known, **json.loads(sys.argv[2])})
internal_kv._internal_kv_put(b"CLUSTER_METADATA", other.encode(), namespace=b"cluster")
"""
"""Has a cluster say that it is of other versions."""


@pytest.fixture(scope="module")
def head(private_folder: Path) -> Iterator[str]:
    """The address of a head of its own, which wants a token."""
    with ray_head(
        private_folder / "ray",
        "--num-cpus=3",
        "--include-dashboard=false",
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=TOKEN,
    ) as address:
        yield address


def pretend(address: str, versions: str) -> None:
    subprocess.run(
        [sys.executable, "-c", OTHERS, address, versions],
        check=True,
        capture_output=True,
        timeout=60,
        env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN},
    )


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Nothing of this machine's own counts."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def said_of(address: str | None) -> Check:
    return list(look_at_ray(address))[-1]


def test_a_cluster_that_answers(head: str, tokens: pytest.MonkeyPatch) -> None:
    tokens.setenv("RAY_AUTH_MODE", "token")
    tokens.setenv("RAY_AUTH_TOKEN", TOKEN)
    version = metadata.version("ray")
    finding = f"{head}: Ray {version}, 1 node, 3 of 3 CPUs free"
    assert list(look_at_ray(head)) == [Check("ray", OK, version), Check("ray cluster", OK, finding)]
    tokens.setenv("RAY_ADDRESS", head)
    assert said_of(None).finding == finding


def test_tokens(head: str, tokens: pytest.MonkeyPatch) -> None:
    refused = said_of(head)
    assert refused.state == FAIL
    assert "set RAY_AUTH_MODE=token" in refused.finding
    tokens.setenv("RAY_AUTH_MODE", "token")
    assert "there is no token here" in said_of(head).finding
    tokens.setenv("RAY_AUTH_TOKEN", "6" * 64)
    assert "it knows another token" in said_of(head).finding


def test_other_versions(head: str, tokens: pytest.MonkeyPatch) -> None:
    tokens.setenv("RAY_AUTH_MODE", "token")
    tokens.setenv("RAY_AUTH_TOKEN", TOKEN)
    pretend(head, '{"ray_version": "2.51.1", "python_version": "3.9.2"}')
    finding = said_of(head).finding
    ours = f"this is Ray {metadata.version('ray')} on Python {sys.version_info.major}.{sys.version_info.minor}"
    assert "runs Ray 2.51.1 on Python 3.9.2" in finding
    assert ours in finding


def test_a_machine_that_is_no_node() -> None:
    said = probe._explained("h:1", "RuntimeError", "No node info found matching attributes: '' when trying")
    assert "this machine is no node of the cluster at h:1" in said


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:{port}", "nothing answers at 127.0.0.1:{port} (Connection refused): is its head up"),
        ("no.such.machine.invalid:{port}", "no.such.machine.invalid is no name of a machine here"),
        ("ray://127.0.0.1:{port}", "is for Ray's client, which this does not use"),
    ],
)
def test_a_cluster_that_is_not_there(address: str, said: str) -> None:
    port = free_port()
    found = said_of(address.format(port=port))
    assert found.state == FAIL
    assert said.format(port=port) in found.finding


async def test_a_port_of_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "PROBE_S", 2.0)
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Unavailable, match="no cluster answered there within 2 s: is it the port of the head"):
            await probe.probe(f"127.0.0.1:{port}")


async def test_a_run_is_told_as_fast() -> None:
    with pytest.raises(RunFailed, match="nothing answers at"):
        async with cluster.connection(f"127.0.0.1:{free_port()}"):
            pass


class TestWithoutRay:
    @pytest.fixture(autouse=True)
    def absent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def version(name: str) -> NoReturn:
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "version", version)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def test_nobody_needs_it(self) -> None:
        (found,) = look_at_ray(None)
        assert found.state == WARN
        assert "pip install 'rollout-orchestrator[ray]'" in found.finding
        assert "(only `--backend ray` and `--shards` need it)" in found.finding

    def test_somebody_does(self) -> None:
        (found,) = look_at_ray("somewhere:6379")
        assert found == Check("ray", FAIL, "not installed: pip install 'rollout-orchestrator[ray]'")


def test_a_ray_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "2.9.3")
    (found,) = look_at_ray("somewhere:6379")
    assert found == Check("ray", FAIL, "2.9.3 is too old, 2.50 is needed: pip install -U 'ray>=2.50'")


def test_looking_imports_no_ray() -> None:
    program = (
        "import sys\n"
        "from orchestrator.cli.doctor_ray import look_at_ray\n"
        "assert len(list(look_at_ray(None))) == 2\n"
        "assert 'ray' not in sys.modules\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    subprocess.run([sys.executable, "-P", "-c", program], check=True, timeout=60, env=environment)
