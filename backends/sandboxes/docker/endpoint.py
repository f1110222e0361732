"""Where a Docker daemon is, as the docker command finds it, and how it is reached there.

A daemon is named by `url`, by DOCKER_HOST, by the current context, or lies at the usual socket; in this order. One of
another machine is spoken to over TCP, with TLS where DOCKER_TLS_VERIFY is set: both sides then prove who they are by
the files of DOCKER_CERT_PATH (ca.pem, cert.pem, key.pem), by default those of ~/.docker.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import aiohttp

from orchestrator.errors import Unavailable

_PORTS: Final = {True: 2376, False: 2375}
"""Of daemons with TLS and without, where none is named."""
_LINGERS: Final = sys.version_info < (3, 12, 7) or (3, 13) <= sys.version_info < (3, 13, 1)
"""A TLS connection of this Python's that is closed stays open where the other side does not say goodbye."""
_USUAL: Final = "/var/run/docker.sock"
_TCP: Final = {"tcp", "http", "https"}


class Endpoint(NamedTuple):
    """A daemon's place: a socket of this machine, or a port of another."""

    url: str
    """By which it is found again: `unix:///path`, or `tcp://HOST:PORT`."""
    path: str = ""
    """Of the socket."""
    host: str = ""
    port: int = 0
    tls: ssl.SSLContext | None = None

    @property
    def remote(self) -> bool:
        """Whether it is reached over TCP: it need not see this machine's files and processes."""
        return not self.path

    @property
    def base(self) -> str:
        """What requests are addressed to."""
        if self.path:
            return "unix://localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'http' if self.tls is None else 'https'}://{host}:{self.port}"

    def connector(self) -> aiohttp.BaseConnector:
        """A daemon that is shutting down closes its door, but goes on answering those inside: each call knocks anew.
        One connection a container stays open: there is no cap."""
        if self.path:
            return aiohttp.UnixConnector(self.path, limit=0, force_close=True)
        context = True if self.tls is None else self.tls
        return aiohttp.TCPConnector(limit=0, force_close=True, ssl=context, enable_cleanup_closed=_LINGERS)

    @property
    def readable(self) -> bool:
        """Whether others can read what goes there: another machine, and no TLS."""
        return self.remote and self.tls is None and not _loopback(self.host)

    async def own_address(self) -> str:
        """The address of this machine that the daemon's is told. Raises Unavailable where nobody else could use it."""
        address = await asyncio.to_thread(_source, self)
        if _loopback(address):
            raise Unavailable(
                f"the Docker daemon at {self.url} is reached over loopback, where its containers find nobody: say with "
                "--listen HOST where they reach this machine"
            )
        return address

    def unreachable(self, error: Exception) -> str:
        """What stands in the way of it, and what to do about it."""
        told = str(error).strip()
        if self.remote:
            return (
                f"the Docker daemon at {self.url} does not answer ({told}): check that it listens there, and with TLS "
                "that DOCKER_TLS_VERIFY=1 is set and DOCKER_CERT_PATH holds ca.pem, cert.pem and key.pem"
            )
        if not os.path.exists(self.path):
            return f"there is no Docker daemon at {self.path}: start it, or name its socket in DOCKER_HOST=unix:///path"
        if not os.access(self.path, os.R_OK | os.W_OK):
            return (
                f"this user may not talk to the Docker daemon at {self.path}: join the group that may (on most systems "
                "`sudo usermod -aG docker $USER`, then log in again)"
            )
        return f"the Docker daemon at {self.path} does not answer ({told}): start it, then try again"


async def find(url: str | None = None) -> Endpoint:
    """The place of the daemon. Raises Unavailable where none is named, or one that is reached in no way known here."""
    if named := url or os.environ.get("DOCKER_HOST"):
        return await asyncio.to_thread(_read, named)
    import aiodocker
    from aiodocker.exceptions import DockerError

    try:
        found = aiodocker.Docker()
    except DockerError as error:
        raise Unavailable(
            f"the current context's Docker daemon cannot be used ({error.message}): name one in "
            "DOCKER_HOST=unix:///path or tcp://HOST:PORT; over ssh none is used"
        ) from None
    except (AssertionError, ValueError) as error:  # where it finds none; of an empty DOCKER_HOST it makes an address
        return _usual(error)
    connector = found.connector
    await found.close()
    if type(connector) is not aiohttp.UnixConnector:  # a way over ssh is of a kind derived from it
        raise Unavailable(
            f"the current context's Docker daemon is at {found.docker_host}: name it in DOCKER_HOST, and its "
            "certificates with DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH"
        )
    return Endpoint(f"unix://{connector.path}", connector.path)


def _usual(error: Exception) -> Endpoint:
    if Path(_USUAL).is_socket():
        return Endpoint(f"unix://{_USUAL}", _USUAL)
    raise Unavailable(
        "no Docker daemon was found: start one, or name its socket in DOCKER_HOST=unix:///path"
    ) from error


def _source(endpoint: Endpoint) -> str:
    """The address that this machine speaks to it from; nothing is sent."""
    try:
        family, kind, _, _, peer = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(peer)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise Unavailable(f"there is no way to the Docker daemon at {endpoint.url}: {error}") from None


def _read(url: str) -> Endpoint:
    scheme, _, rest = url.partition("://")
    if scheme == "unix" and rest:
        return Endpoint(url, rest)
    if scheme == "ssh":
        raise Unavailable(
            f"the Docker daemon at {url} is reached over ssh, by which its containers do not find back: forward its "
            "socket (`ssh -L 127.0.0.1:2375:/var/run/docker.sock HOST`), set DOCKER_HOST=tcp://127.0.0.1:2375, and say "
            "with --listen HOST where they reach this machine"
        )
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise Unavailable(f"DOCKER_HOST {url!r} is no address: {error}") from None
    if scheme not in _TCP or not host:
        raise Unavailable(f"DOCKER_HOST {url!r} is no address: give unix:///path or tcp://HOST:PORT")
    tls = _tls() if os.environ.get("DOCKER_TLS_VERIFY") or scheme == "https" else None
    port = port or _PORTS[tls is not None]
    return Endpoint(f"{'tcp' if scheme == 'http' else scheme}://{parts.netloc.rpartition('@')[2]}", "", host, port, tls)


def _tls() -> ssl.SSLContext:
    """As the docker command has it. Raises Unavailable."""
    folder = Path(os.environ.get("DOCKER_CERT_PATH") or Path.home() / ".docker")
    try:
        context = ssl.create_default_context(cafile=folder / "ca.pem")
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    except OSError as error:  # of ssl's own errors too
        raise Unavailable(
            f"the certificates in {folder} cannot be used ({error}): DOCKER_CERT_PATH names the folder with ca.pem, "
            "cert.pem and key.pem"
        ) from None
    return context


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
