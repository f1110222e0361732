"""Where a container may connect to: an allow-list of destinations, and which of their addresses may be believed.

A destination is `HOST:PORT`, a name or an address (`[::1]:443` in version 6), matched exactly. A name is only as good
as what it resolves to: an address that is not public (loopback, private, link-local with the metadata services,
multicast, reserved, those that clouds keep for a machine's own, or one of these wrapped into version 6) is refused,
unless the list holds that very address and port too. So nobody reaches the host or its network by a name that somebody
else controls. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING, Final, NamedTuple

from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    Address = IPv4Address | IPv6Address

_CLOUDS: Final = (IPv4Network("192.0.0.0/24"), IPv4Network("168.63.129.16/32"))
"""Where clouds serve a machine's own secrets at addresses that count as public: Oracle's older ones, and Azure's."""
_NAT64: Final = IPv6Network("64:ff9b::/96")
_PORTS: Final = range(1, 65536)


class Destination(NamedTuple):
    """A host, in lower case and without brackets, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class AllowList:
    """See the module's docstring."""

    destinations: frozenset[Destination] = frozenset()

    @classmethod
    def of(cls, texts: Iterable[str]) -> AllowList:
        """Read destinations. Raises UsageError for what is none."""
        return cls(frozenset(_listed(text) for text in texts))

    def names(self, wanted: Destination) -> bool:
        """Whether it is on the list, by the name that was asked for."""
        return wanted in self.destinations

    def believes(self, address: str, port: int) -> bool:
        """Whether a connection may be made to what a listed name resolved to."""
        found = ip_address(address.partition("%")[0])
        return _public(found) or Destination(str(found), port) in self.destinations

    def __bool__(self) -> bool:
        return bool(self.destinations)


def parse(text: str) -> Destination:
    """Read `HOST:PORT`. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdecimal() or int(port) not in _PORTS:
        raise ValueError(f"{text!r} has no port from 1 to 65535")
    if host.startswith("["):
        host = str(IPv6Address(host.removeprefix("[").removesuffix("]")))
    elif ":" in host:
        raise ValueError(f"{text!r}: an address of version 6 stands in brackets")
    host = host.lower().removesuffix(".")
    if not host or not host.isascii() or not host.isprintable() or any(letter in " /@*?#\\" for letter in host):
        raise ValueError(f"{text!r} names no host")
    return Destination(host, int(port))


def _listed(text: str) -> Destination:
    try:
        return parse(text)
    except ValueError as error:
        raise UsageError(f"egress: {error}; give HOST:PORT, as in example.org:443") from None


def _public(address: Address) -> bool:
    """Whether an address belongs to the world; what is wrapped into version 6 is judged by itself."""
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in _NAT64:
            inner = IPv4Address(int(address) & 0xFFFF_FFFF)
        if inner is not None:
            return _public(inner)
    elif any(address in network for network in _CLOUDS):
        return False
    odd = address.is_multicast or address.is_reserved or (isinstance(address, IPv6Address) and address.is_site_local)
    return address.is_global and not odd
