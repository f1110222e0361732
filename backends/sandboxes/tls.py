"""A certificate for one listener: made when it begins to listen, known to its own sandboxes alone, gone with it.

The private key never touches a disk that outlives the call: OpenSSL reads it from a file, which is removed at once. A
sandbox trusts this one certificate and no authority, so names and addresses do not matter.
"""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, NamedTuple

from orchestrator.errors import Unavailable

if TYPE_CHECKING:
    from pathlib import Path

VALID: Final = timedelta(days=90)
"""Longer than any run; a listener's certificate is forgotten with it."""
_CLOCKS: Final = timedelta(days=1)
"""How far apart the clocks of two machines may be."""


class Certificate(NamedTuple):
    """`pem` is public; `context` is the listener's, and holds the key."""

    pem: str
    context: ssl.SSLContext


def make(folder: Path) -> Certificate:
    """A fresh certificate. `folder` is private, for a moment. Raises Unavailable without the package `cryptography`."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise Unavailable(
            "sandboxes on other machines are reached over TLS, which needs the package cryptography: install "
            "rollout-orchestrator[tls], or listen without it (insecure)"
        ) from None
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "rollout")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(subject_name=name, issuer_name=name, public_key=key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS)
        .not_valid_after(now + VALID)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = folder / "listener.pem"
    file.touch(mode=0o600)
    try:
        file.write_bytes(secret + pem)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(file)
    finally:
        file.unlink()
    return Certificate(pem.decode(), context)
