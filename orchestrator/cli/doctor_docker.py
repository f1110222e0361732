"""What `rollout doctor` finds about Docker: nothing of it is needed unless sandboxes are to be containers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Final

from orchestrator.cli.checks import OK, WARN, Check

if TYPE_CHECKING:
    from collections.abc import Iterator

    from backends.environments.catalog import EnvironmentSpec
    from backends.sandboxes.docker.port import Engine

INOTIFY: Final = {"max_user_instances": 256, "max_user_watches": 65536}
"""Each container's runtime watches its control group; below this, starts fail with `too many open files`."""


def look_at_docker(_: int) -> Iterator[Check]:
    """The daemon, the images, and what dead orchestrators have left."""
    checks, elsewhere = asyncio.run(_ask())
    yield from checks
    if not elsewhere:
        yield from _look_at_inotify(Path("/proc/sys/fs/inotify"))


async def _ask() -> tuple[list[Check], bool]:
    """What the daemon says, and whether it is another machine's."""
    from backends.environments.catalog import find, names
    from backends.sandboxes.docker.port import Engine, EngineError
    from orchestrator.errors import Unavailable

    try:
        async with await Engine.connect() as engine:
            checks = [await _look_at_daemon(engine)]
            checks += [await _look_at_image(engine, find(name)) for name in names()]
            return [*checks, await _look_at_containers(engine)], engine.remote
    except (Unavailable, EngineError) as error:
        return [Check("docker", WARN, f"{error} (only `--backend docker` needs it)")], False


async def _look_at_daemon(engine: Engine) -> Check:
    info = await engine.info()
    runtimes = ", ".join(sorted(info["Runtimes"]))
    finding = (
        f"{info['ServerVersion']} at {engine.url}, {info['Driver']}, cgroup v{info.get('CgroupVersion', 1)}, "
        f"runtimes {runtimes}"
    )
    lacking = [
        name
        for name, key in (("memory", "MemoryLimit"), ("pids", "PidsLimit"), ("cpus", "CpuCfsQuota"))
        if not info.get(key)
    ]
    if lacking:
        return Check("docker", WARN, f"{finding}; the kernel does not bound {', '.join(lacking)} of a container")
    if engine.endpoint.readable:
        return Check("docker", WARN, f"{finding}; without TLS: set DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH")
    return Check("docker", OK, finding)


async def _look_at_image(engine: Engine, spec: EnvironmentSpec) -> Check:
    from backends.sandboxes.docker.images import ENVIRONMENT, current, image_name

    found = [(one, current(spec, one.labels)) for one in await engine.images({ENVIRONMENT: spec.name})]
    stale = [name for one, fresh in found if not fresh for name in one.names or [one.id.removeprefix("sha256:")[:12]]]
    old = f"; stale, `docker rmi {' '.join(stale)}` frees their space" if stale else ""
    if any(fresh for _, fresh in found):
        return Check(f"image {spec.name}", OK, f"{image_name(spec)}{old}")
    finding = f"none of {spec.name} as it is now: built at its first use, or `rollout image build {spec.name}`{old}"
    return Check(f"image {spec.name}", WARN, finding)


async def _look_at_containers(engine: Engine) -> Check:
    from backends.sandboxes.docker.owners import Standing, owned

    states = [state for _, state in await owned(engine)]
    dead, alive = states.count(Standing.DEAD), states.count(Standing.ALIVE)
    if dead:
        return Check("left-over containers", WARN, f"{dead} without an orchestrator: `rollout reap`")
    return Check("left-over containers", OK, f"none ({alive} in use)")


def _look_at_inotify(folder: Path) -> Iterator[Check]:
    for name, need in INOTIFY.items():
        try:
            allowed = int((folder / name).read_text(encoding="ascii"))
        except OSError:
            continue
        if allowed < need:
            yield Check("inotify", WARN, f"{allowed:,} {name}: `sysctl fs.inotify.{name}={need}` for many containers")
        else:
            yield Check("inotify", OK, f"{allowed:,} {name}")
