"""How containers of another machine's daemon reach this one, and what they cannot have from here."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from backends.sandboxes.listener import Tcp
from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from backends.sandboxes.docker.egress import AllowList
    from backends.sandboxes.docker.port import Engine


class DialIn(NamedTuple):
    """What was said of where containers dial in; `host` None for the address that the daemon is reached from."""

    host: str | None = None
    port: int = 0
    insecure: bool = False

    async def tcp(self, engine: Engine) -> Tcp | None:
        """Where to listen beside the unix socket, for this daemon. Raises UsageError where it was said in vain, or
        would let others read along; Unavailable."""
        if not engine.remote:
            if any(self):
                raise UsageError(
                    f"the containers of the Docker daemon at {engine.url} dial in over a socket of this machine, "
                    "without a network: leave out --listen and --insecure, which are for a daemon reached over TCP "
                    "(DOCKER_HOST=tcp://HOST:PORT)"
                )
            return None
        if engine.endpoint.readable and not self.insecure:
            raise UsageError(
                f"the Docker daemon at {engine.url} is reached without TLS, so that others can read tokens and steps: "
                "set DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH, or say --insecure"
            )
        return Tcp(self.host or await engine.endpoint.own_address(), self.port, self.insecure)


def refuse_egress(engine: Engine, allowed: AllowList) -> None:
    """Raises UsageError where containers of another machine would need the proxy of this one."""
    if engine.remote and allowed:
        raise UsageError(
            f"the proxy of the item `egress` runs on this machine, and the Docker daemon at {engine.url} on another: "
            "leave it out, or name a network of the daemon's with the item `network`"
        )
