"""A Docker daemon on another machine, as far as one machine can have it: another network, reached over TCP with TLS.

Its network namespace holds its own bridge and its own rules, and one cable (a veth pair) leads to this one. Its
containers reach this machine by that cable alone. Needs root.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Network, ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from backends.environments.catalog import find
from backends.sandboxes.docker.base import base_name
from backends.sandboxes.docker.images import image_name
from bench.daemon import PrivateDaemon
from bench.strikes import docker
from orchestrator.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

PORT: Final = 2376
ROLLOUT: Final = str(Path(sys.executable).with_name("rollout"))
_ANOTHER: Final = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'
_DAY: Final = timedelta(days=1)


class Elsewhere:
    """Such a daemon: `url` over TCP, `certificates` for whoever may use it, `here` this machine's address."""

    def __init__(self, folder: Path) -> None:
        number = os.getpid() % 16384
        near, far = IPv4Network(f"10.213.{number // 64}.{number % 64 * 4}/30").hosts()
        self.here, self.there = str(near), str(far)
        self.url = f"tcp://{self.there}:{PORT}"
        self.certificates = folder / "certs"
        self._cable = f"ve{os.getpid()}"
        make_certificates(self.certificates, self.there)
        files = {"tlscacert": "ca", "tlscert": "server", "tlskey": "server-key"}
        self.daemon = PrivateDaemon(
            folder,
            options=(
                f"--host=tcp://0.0.0.0:{PORT}",
                "--tlsverify",
                *(f"--{option}={self.certificates}/{name}.pem" for option, name in files.items()),
            ),
        )

    def environ(self) -> dict[str, str]:
        """What the docker command needs to find it."""
        return {"DOCKER_HOST": self.url, "DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(self.certificates)}

    def lay_cable(self) -> None:
        """Connect both networks; with the daemon's end both ends go."""
        pid, far = str(self.daemon.pid), f"{self._cable}x"
        inside = ("nsenter", "--net", "--target", pid)
        for command in (
            ("ip", "link", "add", self._cable, "type", "veth", "peer", "name", far, "netns", pid),
            ("ip", "address", "add", f"{self.here}/30", "dev", self._cable),
            ("ip", "link", "set", self._cable, "up"),
            (*inside, "ip", "address", "add", f"{self.there}/30", "dev", far),
            (*inside, "ip", "link", "set", far, "up"),
            (*inside, "ip", "link", "set", "lo", "up"),
            (*inside, "ip", "route", "add", "default", "via", self.here),
        ):
            subprocess.run(command, check=True, capture_output=True)

    @contextmanager
    def cut(self) -> Iterator[None]:
        """As if the network between both machines had gone."""
        subprocess.run(["ip", "link", "set", self._cable, "down"], check=True)
        try:
            yield
        finally:
            subprocess.run(["ip", "link", "set", self._cable, "up"], check=True)

    def containers(self, *options: str) -> list[str]:
        """The names of the daemon's containers, ended ones too; `options` of `docker ps`."""
        return docker("ps", "-a", *options, "--format", "{{.Names}}", host=self.daemon.url).split()

    def reap_as_another_machine(self, folder: Path, *options: str) -> dict[str, Any]:
        """What `rollout reap` says where no process of this machine is seen. It has its own `folder`."""
        environ = os.environ | self.environ() | {"TMPDIR": str(folder), "XDG_RUNTIME_DIR": str(folder)}
        command = [*another_machine(folder), ROLLOUT, "reap", "--json", *options]
        done = subprocess.run(command, capture_output=True, check=True, env=environ)
        said: dict[str, Any] = json.loads(done.stdout)
        return said


def another_machine(folder: Path) -> list[str]:
    """How a command begins that takes this machine for another one."""
    boot = folder / "boot_id"
    boot.write_text(f"{uuid4()}\n", encoding="ascii")
    return ["unshare", "--mount", "sh", "-c", _ANOTHER, str(boot)]


@contextmanager
def elsewhere(folder: Path) -> Iterator[Elsewhere]:
    """One that runs, with BFCL's image and the base that others are built on, where this machine has made them.

    Raises Unavailable where this machine, or this user, cannot have one.
    """
    if lacking := [name for name in ("ip", "nsenter", "unshare") if shutil.which(name) is None]:
        raise Unavailable(f"a daemon of another network needs {', '.join(lacking)}")
    made = Elsewhere(folder)
    made.daemon.start()
    try:
        made.lay_cable()
        there = docker("images", "--format", "{{.Repository}}:{{.Tag}}").split()
        for name in {base_name(), image_name(find("bfcl"))}.intersection(there):
            made.daemon.copy(name)
        yield made
    finally:
        if not made.containers():
            made.daemon.stop(signal.SIGKILL)  # else it waits 15 s for connections that a cut cable has left
        made.daemon.end()
        shutil.rmtree(folder, ignore_errors=True)


def make_certificates(folder: Path, address: str) -> None:
    """An authority, and what it vouches for: a daemon at the address, and one client."""
    folder.mkdir()
    authority = ec.generate_private_key(ec.SECP256R1())
    ca = _certificate("authority", authority, "authority", authority, None)
    _write(folder, "ca", ca)
    for name, purpose in (("server", "serverAuth"), ("", "clientAuth")):
        key = ec.generate_private_key(ec.SECP256R1())
        extension = [x509.IPAddress(ip_address(address))] if purpose == "serverAuth" else None
        _write(folder, name or "cert", _certificate(name or "client", key, "authority", authority, extension, purpose))
        secret = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (folder / f"{name}-key.pem".lstrip("-")).write_bytes(secret)


def _certificate(
    subject: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    signer: ec.EllipticCurvePrivateKey,
    addresses: list[x509.IPAddress] | None,
    purpose: str | None = None,
) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder(_name(issuer), _name(subject), key.public_key(), x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + _DAY)
        .add_extension(x509.BasicConstraints(ca=purpose is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if addresses is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(addresses), critical=False)
    if purpose is not None:
        usage = {"serverAuth": ExtendedKeyUsageOID.SERVER_AUTH, "clientAuth": ExtendedKeyUsageOID.CLIENT_AUTH}
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage[purpose]]), critical=False)
    return builder.sign(signer, hashes.SHA256())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _write(folder: Path, name: str, certificate: x509.Certificate) -> None:
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
