"""What an image that serves AgentScope's environment service is run with. Values only.

Such an image is of somebody else's making: it listens on a port of all interfaces, knows no token, and writes where it
likes. It gets no network at all (its own loopback alone), no capability and bounds on everything but its root's disk;
its user and a writable root are its own, until `hardening` says otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from backends.environments.catalog import Resources
from backends.sandboxes.docker.hardening import Hardening
from backends.sandboxes.docker.images import ENVIRONMENT
from backends.sandboxes.docker.relay import FOLDER
from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

PORT: Final = 80
"""Where the original images listen."""
READY_S: Final = 120.0
"""How long the service may take to answer: it starts a cluster of its own first."""
OF_ORIGINALS: Final = Hardening(user="", read_only=False, open_files=8192)
"""The user is the image's own. A service opens files for each of its processes."""
SERVICE: Final = "rollout.service"
"""The label of the container that serves; the relay beside it does not carry it."""
_KEYLESS: Final = {"OPENAI_API_KEY": "none"}
"""Without one the original grades every answer 0.0, though it asks nobody."""
_RELAY: Final = Hardening()
_RELAY_BOUNDS: Final = Resources(cpus=1.0, memory_mb=128, pids=32, tmp_mb=1, shm_mb=1)
_MEMORY_MB: Final = (2048, 512)
_PIDS: Final = (1024, 128)
"""Of the service itself, and of each instance: measured 650 MB and 200, and 260 MB and about 60."""


@dataclass(frozen=True, slots=True)
class Volume:
    """A path of this machine's that the container sees at `target`."""

    source: Path
    target: str
    read_only: bool = True


@dataclass(frozen=True, slots=True)
class ServiceImage:
    """See the module's docstring. `variables` are its environment variables, `ready_s` is in seconds."""

    name: str
    port: int = PORT
    variables: Mapping[str, str] = field(default_factory=dict)
    volumes: Sequence[Volume] = ()
    hardening: Hardening = OF_ORIGINALS
    ready_s: float = READY_S

    def __post_init__(self) -> None:
        if not self.name:
            raise UsageError("an image needs a name, as in agentscope/runtime-sandbox-bfcl:latest")
        if self.hardening.egress:
            raise UsageError(
                "the item `egress` needs this project's own server in the image: leave it out, or name a network of "
                "the engine's with the item `network`"
            )

    def resources(self, instances: int) -> Resources:
        """Bounds for a container that holds so many instances, each a process; the hardening's items come over them."""
        base, each = _MEMORY_MB
        few, more = _PIDS
        return Resources(
            cpus=0, memory_mb=base + each * instances, pids=few + more * instances, tmp_mb=1024, shm_mb=1024
        )

    def config(self, environment: str, instances: int, labels: Mapping[str, str]) -> dict[str, Any]:
        """The body of the engine's call for the container that serves."""
        resources = self.resources(instances)
        host = self.hardening.host_config(resources)
        size = self.hardening.bounds(resources).tmp_mb
        host["Tmpfs"] = {"/tmp": f"rw,noexec,nosuid,nodev,mode=1777{f',size={size}m' if size else ''}"}
        host["Sysctls"] = {"net.ipv4.ip_unprivileged_port_start": "0"}  # port 80 without a capability
        host["Mounts"] = [
            {"Type": "bind", "Source": str(one.source), "Target": one.target, "ReadOnly": one.read_only}
            for one in self.volumes
        ]
        return {
            "Image": self.name,
            "Env": [f"{name}={value}" for name, value in {**_KEYLESS, **self.variables}.items()],
            "Labels": {**labels, ENVIRONMENT: environment, SERVICE: environment},
            "AttachStdout": True,
            "AttachStderr": True,
            "HostConfig": host,
            **({"User": self.hardening.user} if self.hardening.user else {}),
        }

    def relay(self, base: str, service: str, folder: Path, labels: Mapping[str, str]) -> dict[str, Any]:
        """The body of the engine's call for the relay: it has the network of the container `service`, and its socket
        in `folder`. `base` is an image with a Python."""
        source = Path(__file__).with_name("relay.py").read_text(encoding="utf-8")
        host = replace(_RELAY, network=f"container:{service}").host_config(_RELAY_BOUNDS)
        host["Mounts"] = [{"Type": "bind", "Source": str(folder), "Target": FOLDER, "ReadOnly": False}]
        return {
            "Image": base,
            "Entrypoint": ["python3", "-I", "-c", source],
            "Cmd": [str(self.port)],
            "User": _RELAY.user,
            "WorkingDir": "/",
            "Labels": dict(labels),
            "AttachStdout": True,
            "AttachStderr": True,
            "HostConfig": host,
        }


def volumes_of(value: object) -> tuple[Volume, ...]:
    """Volumes as the docker client for Python has them: `{SOURCE: {"bind": TARGET, "mode": "ro"}}`, or a list of
    `SOURCE:TARGET[:MODE]`. Raises UsageError."""
    pairs: list[tuple[str, str, str]] = []
    if isinstance(value, Mapping):
        for source, bound in value.items():
            if not isinstance(bound, Mapping) or "bind" not in bound:
                raise UsageError(f'volume {source!r} is {{"bind": TARGET, "mode": "ro"}}, not {bound!r}')
            pairs.append((str(source), str(bound["bind"]), str(bound.get("mode", "rw"))))
    elif isinstance(value, list | tuple):
        for text in value:
            source, _, rest = str(text).partition(":")
            target, _, mode = rest.partition(":")
            pairs.append((source, target or source, mode or "rw"))
    else:
        raise UsageError(f"volumes are a mapping or a list, not {value!r}")
    for source, target, mode in pairs:
        if not (os.path.isabs(source) and os.path.isabs(target)) or mode not in {"ro", "rw"}:
            raise UsageError(f"volume {source}:{target}:{mode}: both paths are absolute, the mode is ro or rw")
    return tuple(Volume(Path(source), target, mode == "ro") for source, target, mode in pairs)
