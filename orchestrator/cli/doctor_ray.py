"""What `rollout doctor` finds about Ray: nothing of it is needed unless a run is to be on a cluster.

Ray itself is imported nowhere here: what must be asked of a cluster is asked by a process of its own.
"""

from __future__ import annotations

import asyncio
import os
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING

from orchestrator.cli.checks import FAIL, OK, WARN, Check

if TYPE_CHECKING:
    from collections.abc import Iterator

EXTRA = "pip install 'rollout-orchestrator[ray]'"
ONLY = "(only `--backend ray` and `--shards` need it)"


def look_at_ray(address: str | None) -> Iterator[Check]:
    """The package, and the cluster at `address` (default: RAY_ADDRESS). With an address, what is wrong is a FAIL."""
    from backends.sandboxes.ray.cluster import VERSION

    address = address or os.environ.get("RAY_ADDRESS") or None
    wrong, only = (FAIL, "") if address else (WARN, f" {ONLY}")
    try:
        version = metadata.version("ray")
    except metadata.PackageNotFoundError:
        yield Check("ray", wrong, f"not installed: {EXTRA}{only}")
        return
    if tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) < VERSION:
        oldest = ".".join(map(str, VERSION))
        yield Check("ray", wrong, f"{version} is too old, {oldest} is needed: pip install -U 'ray>={oldest}'{only}")
        return
    if find_spec("cryptography") is None:
        yield Check("ray", wrong, f"{version}, but no cryptography, which TLS needs: {EXTRA}, or --insecure{only}")
    else:
        yield Check("ray", OK, version)
    yield _cluster(address)


def _cluster(address: str | None) -> Check:
    from backends.sandboxes.ray.probe import probe
    from orchestrator.errors import Unavailable

    if address is None:
        return Check("ray cluster", OK, "no address: a run starts a cluster of its own (else RAY_ADDRESS)")
    try:
        found = asyncio.run(probe(address))
    except Unavailable as error:
        return Check("ray cluster", FAIL, str(error))
    nodes = "1 node" if found.nodes == 1 else f"{found.nodes} nodes"
    finding = f"{address}: Ray {found.ray}, {nodes}, {found.free:g} of {found.cpus:g} CPUs free"
    if found.free < 1:
        return Check("ray cluster", WARN, f"{finding}: a run waits for some (`ray status` says who has them)")
    return Check("ray cluster", OK, finding)
