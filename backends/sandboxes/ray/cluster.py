"""This process's connection to a Ray cluster, and what it asks of it.

Ray is one connection a process. Always true: a connection that was there before is used and left there; one that was
made here ends with its last user, and with it a cluster that was started here, because no address was given.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import threading
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from backends.sandboxes.ray.reach import reachable
from backends.sandboxes.ray.thread import RayThread
from orchestrator.errors import RunFailed, Unavailable, UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from types import ModuleType

NAMESPACE: Final = "rollout"
"""Where all of our actors are named."""
CONNECT_S: Final = 60.0
VERSION: Final = (2, 50)
"""The oldest Ray that this is written for."""

_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m")

Strategy: TypeAlias = Literal["spread", "pack"]

log = logging.getLogger(__name__)
_users = 0
_thread: RayThread | None = None
"""That of a connection which was made here."""
_changing = asyncio.Lock()


@dataclass(frozen=True, slots=True)
class RayOptions:
    """What every actor of a backend asks for."""

    cpus: float = 1.0
    """CPUs that one is counted as."""
    memory_mb: int | None = None
    """Memory that one is counted as."""
    resources: Mapping[str, float] = field(default_factory=dict)
    """The cluster's own resources."""
    strategy: Strategy = "spread"
    """Over the nodes, or as few of them as possible."""
    node_labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that its node must have."""
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    """How a node comes by this package, where it is not installed there; see Ray's documentation."""

    def actor(self, name: str) -> dict[str, Any]:
        """The options of an actor called `name`. It is never restarted: its state would be empty."""
        options: dict[str, Any] = {
            "name": name,
            "namespace": NAMESPACE,
            "num_cpus": self.cpus,
            "resources": dict(self.resources),
            "scheduling_strategy": "SPREAD" if self.strategy == "spread" else "DEFAULT",
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": 32,
        }
        if self.memory_mb is not None:
            options["memory"] = self.memory_mb << 20
        if self.node_labels:
            options["label_selector"] = dict(self.node_labels)
        if self.runtime_env:
            options["runtime_env"] = dict(self.runtime_env)
        return options

    def check(self, ray: ModuleType, kind: type) -> None:
        """Raises UsageError for what Ray refuses of an actor of this kind, in its words. May read files."""
        try:
            ray.remote(kind).options(**self.actor("one"))
        except (ValueError, TypeError) as error:
            raise UsageError(f"Ray refuses what is asked for: {error}") from None

    def wanted(self, ray: ModuleType) -> str:
        """What one asks for, and what the cluster has. Blocks on the cluster."""
        asked = [f"{self.cpus:g} CPUs"]
        if self.memory_mb is not None:
            asked.append(f"{self.memory_mb} MiB")
        asked += [f"{count:g} {name}" for name, count in self.resources.items()]
        asked += [f"{name}={value}" for name, value in self.node_labels.items()]
        alive = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
        free = ray.available_resources().get("CPU", 0.0)
        return (
            f"it asks for {', '.join(asked)}; the cluster has {sum(alive):g} CPUs on {len(alive)} nodes, "
            f"{free:g} of them free"
        )


def module() -> ModuleType:
    """Ray. Raises Unavailable where it is not installed, or too old."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise Unavailable("Ray is not installed: pip install 'rollout-orchestrator[ray]'") from None
    found = tuple(int(part) for part in ray.__version__.split(".")[:2] if part.isdecimal())
    if found < VERSION:
        oldest = ".".join(map(str, VERSION))
        raise Unavailable(f"Ray {ray.__version__} is too old, this needs {oldest}: pip install -U ray")
    loaded: ModuleType = ray
    return loaded


@asynccontextmanager
async def connection(address: str | None) -> AsyncIterator[None]:
    """Be connected; without an address (and without RAY_ADDRESS) to a cluster of this machine's own.

    Raises Unavailable, RunFailed where no cluster answers. Cancelled: the connection is ended in the background.
    """
    ray = await asyncio.to_thread(module)
    async with _changing:
        await _connect(ray, address)
    try:
        yield
    finally:
        await asyncio.shield(_leave(ray))


async def _connect(ray: ModuleType, address: str | None) -> None:
    global _users, _thread  # Ray itself is one connection a process
    if _users == 0 and not ray.is_initialized():
        where = address or os.environ.get("RAY_ADDRESS") or "a cluster of its own"
        if "://" in where:
            raise UsageError(
                f"{where} is not the address of a cluster's head, which is HOST:PORT: Ray's client and its server of "
                "jobs do not lead there; run on a node of the cluster, or by `ray job submit`"
            )
        try:
            await reachable(where)
            _thread = await _initialised(ray, address)
        except TimeoutError:
            raise RunFailed(f"no cluster answered at {where} within {CONNECT_S:g} s; see `rollout doctor`") from None
        except (ConnectionError, RuntimeError, ValueError, OSError, Unavailable) as error:
            raise RunFailed(f"cannot connect to {where}: {error.__cause__ or error}; see `rollout doctor`") from None
    _users += 1


async def _initialised(ray: ModuleType, address: str | None) -> RayThread:
    thread = RayThread()
    try:
        async with asyncio.timeout(CONNECT_S):
            await thread.call(partial(_init, ray, address))
    except BaseException:
        thread.end(ray.shutdown)  # should it come yet
        raise
    _restore_signals()
    return thread


def _restore_signals() -> None:
    """Ray lays a handler of its own over SIGTERM's, which writes a stack trace and ends the process."""
    if threading.current_thread() is threading.main_thread() and (ours := signal.getsignal(signal.SIGTERM)) is not None:
        signal.signal(signal.SIGTERM, ours)
        signal.siginterrupt(signal.SIGTERM, False)


def _init(ray: ModuleType, address: str | None) -> None:
    ray.init(
        address=address or os.environ.get("RAY_ADDRESS") or "local",
        namespace=NAMESPACE,
        log_to_driver=False,
        logging_level=logging.ERROR,
        **({} if address or os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}),
    )


async def _leave(ray: ModuleType) -> None:
    global _users, _thread
    async with _changing:
        _users -= 1
        if _users == 0 and _thread is not None:
            thread, _thread = _thread, None
            await thread.call(ray.shutdown)
            thread.end()


def own_address(ray: ModuleType) -> str:
    """The address of this machine that the cluster's nodes reach. Raises UsageError before a connection."""
    if not ray.is_initialized():
        raise UsageError("not connected to a cluster")
    return str(ray.util.get_node_ip_address())


def actors_of(ray: ModuleType, prefix: str) -> list[str]:
    """The names of living actors of ours that begin with `prefix`."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return [one["name"] for one in named if one["namespace"] == NAMESPACE and one["name"].startswith(prefix)]


def told(error: BaseException) -> str:
    """What an error of Ray's comes to, in one line: its own first, or a remote traceback's last."""
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    remote = lines[0].startswith("ray::") or any(line.startswith("Traceback") for line in lines)
    return lines[-1 if remote else 0][:300]
