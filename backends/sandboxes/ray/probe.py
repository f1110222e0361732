"""Whether a cluster is there and lets this machine in, found out within seconds.

Ray is asked in a process of its own, because it tries for long and ends its process where nobody answers; that is
killed as soon as what it writes says enough. Every failure becomes a sentence that says what to do.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections import deque
from typing import Final, NamedTuple

import orjson

from backends.sandboxes.ray.cluster import NAMESPACE, module, told
from backends.sandboxes.ray.reach import reachable
from orchestrator.errors import Unavailable

PROBE_S: Final = 15.0
NODE_S: Final = 5
"""How long Ray looks for a node on this machine."""
TOKEN_MODE: Final = "RAY_AUTH_MODE"
_TOKEN_AT: Final = "~/.ray/auth_token, or RAY_AUTH_TOKEN"
_VERSIONS: Final = re.compile(r"Ray: (\S+).*?Python: (\S+)", re.DOTALL)
_KEPT: Final = 20


class Found(NamedTuple):
    """A cluster that answers: its version and Python, living nodes, CPUs, and those that nobody has taken."""

    ray: str
    python: str
    nodes: int
    cpus: float
    free: float


async def probe(address: str) -> Found:
    """Ask the cluster at `address`. Raises Unavailable with what is wrong. Cancelled: Ray's process is killed."""
    if address.startswith("ray://"):
        raise Unavailable(
            f"{address} is for Ray's client, which this does not use: run on a node of the cluster with HOST:PORT of "
            "its head, or with `ray job submit`"
        )
    await reachable(address)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "backends.sandboxes.ray.probe", address),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "RAY_gcs_server_request_timeout_seconds": str(NODE_S)},
    )
    said: deque[str] = deque(maxlen=_KEPT)
    try:
        async with asyncio.timeout(PROBE_S):
            assert process.stdout is not None, "a pipe was asked for"
            async for line in process.stdout:
                said.append(line.decode(errors="replace").strip())
                if "InvalidAuthToken" in said[-1]:  # Ray asks again, twenty times
                    break
            else:
                await process.wait()
    except TimeoutError:
        raise Unavailable(
            f"{address} is open, and no cluster answered there within {PROBE_S:g} s: is it the port of the head (6379 "
            "by default), not of its dashboard (8265) or its client (10001)?"
        ) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return _judged(address, said)


def _judged(address: str, said: deque[str]) -> Found:
    """What the probe's output comes to."""
    last = said[-1] if said else ""
    if "InvalidAuthToken" in last:
        raise Unavailable(f"the cluster at {address} refuses this machine: {_refusal()}")
    if not last.startswith("{"):
        raise Unavailable(f"Ray ended while it connected to {address}: {last or 'it wrote nothing'}")
    answer = orjson.loads(last)
    if "error" in answer:
        raise Unavailable(_explained(address, answer["kind"], answer["error"]))
    return Found(**answer)


def _refusal() -> str:
    if os.environ.get(TOKEN_MODE, "").lower() == "token":
        return f"it knows another token; copy that of its head (`ray get-auth-token` there) to {_TOKEN_AT}"
    return f"it wants a token, and none is sent; set {TOKEN_MODE}=token, with the token of its head in {_TOKEN_AT}"


def _explained(address: str, kind: str, error: str) -> str:
    if error.startswith("Version mismatch") and len(found := _VERSIONS.findall(error)) == 2:
        (ray, python), (our_ray, our_python) = found
        return (
            f"the cluster at {address} runs Ray {ray} on Python {python}, and this is Ray {our_ray} on Python "
            f"{our_python}: install the same Ray here, and the same minor version of Python"
        )
    if kind == "AuthenticationError":
        return f"{TOKEN_MODE} is token, and there is no token here: copy that of the cluster's head to {_TOKEN_AT}"
    if error.startswith("No node info found"):
        return (
            f"this machine is no node of the cluster at {address}: make it one (`ray start --address={address}`), or "
            "run the command on one (`ray job submit`)"
        )
    return f"cannot connect to {address}: {error.splitlines()[0] if error else kind}"


def _ask(address: str) -> dict[str, object]:
    import logging

    ray = module()
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        cause = error.__cause__ or error
        mismatch = str(cause).startswith("Version mismatch")
        return {"kind": type(cause).__name__, "error": str(cause) if mismatch else told(cause)}
    python = ".".join(map(str, sys.version_info[:3]))
    nodes = sum(node["Alive"] for node in ray.nodes())
    cpus, free = (float(count.get("CPU", 0.0)) for count in (ray.cluster_resources(), ray.available_resources()))
    ray.shutdown()
    return Found(ray.__version__, python, nodes, cpus, free)._asdict()


if __name__ == "__main__":
    sys.stdout.write(orjson.dumps(_ask(sys.argv[1])).decode() + "\n")
