"""Where a Docker daemon is, how it is reached, and whose containers are judged by what."""

from __future__ import annotations

import json
import os
import socket
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest

from backends.sandboxes.docker import endpoint
from backends.sandboxes.docker.endpoint import Endpoint, find
from backends.sandboxes.docker.owners import LEASE, NAMESPACE, OWNER, Standing, owner_labels, standing
from backends.sandboxes.docker.port import EngineGone
from orchestrator.cli.config import load
from orchestrator.errors import Unavailable, UsageError
from orchestrator.rundir import Owner

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@pytest.fixture(autouse=True)
def _no_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DOCKER_HOST", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH"):
        monkeypatch.delenv(name, raising=False)


class TestEndpoint:
    @pytest.mark.parametrize(
        ("url", "kept", "base"),
        [
            ("unix:///run/d.sock", "unix:///run/d.sock", "unix://localhost"),
            ("tcp://far.example:2375", "tcp://far.example:2375", "http://far.example:2375"),
            ("tcp://far.example", "tcp://far.example", "http://far.example:2375"),
            ("http://far.example:80/", "tcp://far.example:80", "http://far.example:80"),
            ("tcp://[fd00::7]:2375", "tcp://[fd00::7]:2375", "http://[fd00::7]:2375"),
            ("tcp://user:word@far.example:2375", "tcp://far.example:2375", "http://far.example:2375"),
        ],
    )
    async def test_as_the_docker_command_writes_it(self, url: str, kept: str, base: str) -> None:
        found = await find(url)
        assert (found.url, found.base, found.remote) == (kept, base, not url.startswith("unix"))
        assert (await find(found.url)) == found, "the reaper finds it again"

    async def test_the_environment_names_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DOCKER_HOST", "tcp://192.0.2.7:2375")
        assert (await find()).host == "192.0.2.7"
        assert (await find("unix:///run/d.sock")).path == "/run/d.sock", "an argument comes first"

    @pytest.mark.parametrize(
        ("url", "says"),
        [
            ("ssh://me@far", r"over ssh.*ssh -L.*DOCKER_HOST=tcp://127\.0\.0\.1:2375.*--listen HOST"),
            ("npipe:////./pipe/docker_engine", "no address: give unix:///path or tcp://HOST:PORT"),
            ("tcp://", "no address: give unix"),
            ("tcp://far:port", "no address: Port"),
            ("/run/d.sock", "no address: give unix"),
        ],
    )
    async def test_what_is_refused(self, url: str, says: str) -> None:
        with pytest.raises(Unavailable, match=says):
            await find(url)

    async def test_tls_without_certificates(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
        monkeypatch.setenv("DOCKER_CERT_PATH", str(tmp_path))
        with pytest.raises(
            Unavailable, match=r"DOCKER_CERT_PATH names the folder with ca\.pem, cert\.pem and key\.pem"
        ):
            await find("tcp://far.example")
        (tmp_path / "ca.pem").write_text("nothing", encoding="ascii")
        with pytest.raises(Unavailable, match=f"the certificates in {tmp_path} cannot be used"):
            await find("tcp://far.example")

    def test_who_can_read_along(self) -> None:
        assert Endpoint("tcp://192.0.2.7:2375", host="192.0.2.7", port=2375).readable
        assert Endpoint("tcp://far.example:2375", host="far.example", port=2375).readable
        assert not Endpoint("tcp://localhost:2375", host="localhost", port=2375).readable
        assert not Endpoint("tcp://[::1]:2375", host="::1", port=2375).readable
        assert not Endpoint("unix:///run/d.sock", "/run/d.sock").readable

    async def test_over_loopback_nobody_finds_back(self) -> None:
        with pytest.raises(Unavailable, match="its containers find nobody: say with --listen HOST"):
            await (await find("tcp://127.0.0.1:2375")).own_address()

    async def test_a_host_without_an_address(self) -> None:
        with pytest.raises(Unavailable, match=r"no way to the Docker daemon at tcp://no-such-host\.invalid"):
            await (await find("tcp://no-such-host.invalid:2375")).own_address()

    def test_what_stands_in_the_way(self, tmp_path: Path) -> None:
        error = EngineGone("version: gone\n")
        far = Endpoint("tcp://192.0.2.7:2376", host="192.0.2.7", port=2376)
        assert "does not answer (version: gone): check that it listens there, and with TLS that" in far.unreachable(
            error
        )
        missing = Endpoint("unix:///nowhere", "/nowhere")
        assert missing.unreachable(error).startswith("there is no Docker daemon at /nowhere: start it")
        deaf = Endpoint(f"unix://{tmp_path}", str(tmp_path))
        assert deaf.unreachable(error).endswith("does not answer (version: gone): start it, then try again")

    def test_of_which_pythons_connections_linger(self) -> None:
        """The client library refuses to be told where they do not."""
        from aiohttp.connector import NEEDS_CLEANUP_CLOSED

        assert endpoint._LINGERS is NEEDS_CLEANUP_CLOSED


class TestContexts:
    """What the docker command has kept in the home directory of this user."""

    @pytest.fixture
    def no_blocking(self) -> None:
        """A few small files are read once, as the daemon is connected to."""

    @pytest.fixture(autouse=True)
    def _home(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))

    async def test_an_empty_name_is_none(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """As the docker command takes it: the daemon is at the usual socket, if there is one."""
        usual = tmp_path / "docker.sock"
        monkeypatch.setattr(endpoint, "_USUAL", str(usual))
        monkeypatch.setenv("DOCKER_HOST", "")
        with pytest.raises(Unavailable, match="no Docker daemon was found: start one"):
            await find()
        with socket.socket(socket.AF_UNIX) as daemon:
            daemon.bind(str(usual))
            assert await find() == Endpoint(f"unix://{usual}", str(usual))

    @pytest.mark.parametrize(
        ("host", "says"),
        [
            (None, r"cannot be used \(.*not found.*\): name one in DOCKER_HOST"),
            ("ssh://me@far", r"cannot be used \(.*\): name one in DOCKER_HOST=unix:///path.*over ssh none is used"),
            ("tcp://far:2376", "is at tcp://far:2376: name it in DOCKER_HOST"),
        ],
    )
    async def test_contexts_that_are_refused(
        self, host: str | None, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        self.context(tmp_path, host)
        monkeypatch.setenv("DOCKER_CONTEXT", "far")
        with pytest.raises(Unavailable, match=says):
            await find()

    async def test_a_context_of_this_machine(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.context(tmp_path, "unix:///other/d.sock")
        monkeypatch.setenv("DOCKER_CONTEXT", "far")
        assert await find() == Endpoint("unix:///other/d.sock", "/other/d.sock")

    def context(self, home: Path, host: str | None) -> None:
        """One named `far`, as the docker command keeps it; None for one that is named and is not there."""
        folder = home / ".docker" / "contexts" / "meta" / sha256(b"far").hexdigest()
        folder.mkdir(parents=True)
        if host is not None:
            meta = {"Name": "far", "Endpoints": {"docker": {"Host": host}}}
            (folder / "meta.json").write_text(json.dumps(meta), encoding="ascii")


class TestStanding:
    """Whose process can be seen is judged by it; everybody else by the lease, if there is one."""

    POST = "rollout-toy-1-outpost-1"

    def labels(self, owner: Owner, *, lease: bool = True, namespace: str | None = None) -> Mapping[str, str]:
        return {
            OWNER: f"{owner.boot}:{owner.pid}:{owner.start}",
            NAMESPACE: namespace or owner_labels()[NAMESPACE],
            **({LEASE: self.POST} if lease else {}),
        }

    @pytest.mark.parametrize("state", ["running", "exited", None])
    def test_an_owner_that_is_seen(self, state: str | None) -> None:
        leases = {} if state is None else {self.POST: state}
        me = Owner.current()
        assert standing(self.labels(me), leases, remote=True) is Standing.ALIVE
        assert standing(self.labels(Owner(me.boot, me.pid, me.start + 1)), leases, remote=True) is Standing.DEAD

    @pytest.mark.parametrize(
        ("state", "found"),
        [
            ("created", Standing.UNKNOWN),
            ("running", Standing.ALIVE),
            ("paused", Standing.ALIVE),
            ("exited", Standing.DEAD),
            ("dead", Standing.DEAD),
            ("removing", Standing.DEAD),
            (None, Standing.DEAD),
        ],
    )
    @pytest.mark.parametrize("remote", [True, False])
    def test_an_owner_elsewhere(self, state: str | None, found: Standing, remote: bool) -> None:
        """Of another machine, of another namespace of processes, or where a machine does not say which boot it is."""
        leases = {} if state is None else {self.POST: state}
        me = Owner.current()
        assert standing(self.labels(Owner("another", me.pid, me.start)), leases, remote=remote) is found
        assert standing(self.labels(me, namespace="pid:[1]"), leases, remote=remote) is found
        assert standing(self.labels(Owner("", me.pid, me.start)), leases, remote=remote) is found

    def test_an_owner_elsewhere_without_a_lease(self) -> None:
        """At this machine's daemon it is one of an earlier boot; at another's it may be that machine's own."""
        labels = self.labels(Owner("another", os.getpid(), 1), lease=False)
        assert standing(labels, remote=True) is Standing.UNKNOWN
        assert standing(labels) is Standing.DEAD

    @pytest.mark.parametrize(
        ("state", "found"),
        [
            ("running", Standing.UNKNOWN),
            ("paused", Standing.UNKNOWN),
            ("exited", Standing.DEAD),
            ("created", Standing.DEAD),
            ("dead", Standing.DEAD),
        ],
    )
    def test_no_container_outlives_the_boot_of_its_machine(self, state: str, found: Standing) -> None:
        """One that runs is not of an earlier boot: the socket leads to another machine, or its owner is in a guest."""
        labels = self.labels(Owner("another", os.getpid(), 1), lease=False)
        assert standing(labels, state=state) is found
        assert standing(self.labels(Owner.current(), lease=False), state=state) is Standing.ALIVE


class TestOptions:
    GIVEN: Mapping[str, object] = {"env": "toy", "backend": "docker"}

    def test_docker_may_be_told_where_to_listen(self) -> None:
        config = load(None, {**self.GIVEN, "listen": "192.0.2.1:7000", "insecure": True})
        assert (config.listen, config.insecure) == ("192.0.2.1:7000", True)

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            (
                {"backend": "local", "listen": "192.0.2.1"},
                "--listen is for --backend ray and for --shards, and for --ba",
            ),
            ({"backend": "local", "insecure": True}, "another machine's"),
            ({"ray_cpus": 2.0}, "--ray-cpus is for --backend ray and for --shards$"),
            ({"image": "of-somebody:1", "image_protocol": "env_service", "listen": "192.0.2.1"}, "--listen is for"),
        ],
    )
    def test_nobody_else(self, given: Mapping[str, object], says: str) -> None:
        with pytest.raises(UsageError, match=says):
            load(None, {**self.GIVEN, **given})
