"""`rollout doctor`: can this machine do what is asked of it?"""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Final

import typer

from orchestrator.cli import options
from orchestrator.cli.checks import FAIL, OK, WARN, Check
from orchestrator.cli.doctor_docker import look_at_docker
from orchestrator.cli.doctor_ray import look_at_ray
from orchestrator.cli.exits import FAILED

SQLITE: Final = (3, 51, 3)
"""The first SQLite without the WAL-reset bug, which can lose committed rows."""
PACKAGES: Final = ("aiodocker", "aiohttp", "apsw", "orjson", "pydantic", "PyYAML", "rich", "typer")
SPARE_FILES: Final = 256
"""File descriptors besides one an episode: the store, the journal, sandboxes, logs."""
LOW_DISK: Final = 2**30


def doctor(
    concurrency: Annotated[int, typer.Option(help="The concurrency you want to run with.")] = 256,
    ray_address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="The Ray cluster to try (default: RAY_ADDRESS).")
    ] = None,
    json: options.Json = False,
) -> None:
    """Check Python, packages, limits, environments, disk, Docker, Ray and what was left behind. Exits 1 on a FAIL."""
    from rich.table import Table
    from rich.text import Text

    from orchestrator.cli.output import emit_json, people, results

    checks = [*(check for look in _LOOKS for check in look(concurrency)), *look_at_ray(ray_address)]
    table = Table(box=None, pad_edge=False, show_header=False)
    styles = {OK: "green", WARN: "yellow", FAIL: "bold red"}
    for check in checks:
        table.add_row(Text(check.state, styles[check.state]), Text(check.what), Text(check.finding))
    (people() if json else results()).print(table)
    if json:
        emit_json({"checks": [check._asdict() for check in checks]})
    if any(check.state == FAIL for check in checks):
        raise typer.Exit(FAILED)


def look_at_python(_: int) -> Iterator[Check]:
    """The interpreter, the platform and the packages."""
    version = platform.python_version()
    yield Check("python", OK, f"{version} ({sys.executable}), {os.cpu_count()} cores")
    if sys.platform == "linux":
        yield Check("platform", OK, platform.platform())
    elif sys.platform == "darwin":
        yield Check("platform", WARN, "macOS: the local backend only; servers are not killed with their parent")
    else:
        yield Check("platform", FAIL, f"{sys.platform}: use Linux, or macOS for the local backend")
    for package in PACKAGES:
        try:
            yield Check(package, OK, metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Check(package, FAIL, f"not installed: `{sys.executable} -m pip install {package}`")


def look_at_sqlite(_: int) -> Iterator[Check]:
    """The SQLite library that the store uses."""
    try:
        import apsw
    except ImportError as error:
        yield Check("sqlite", FAIL, f"apsw cannot be imported: {error}")
        return
    version = apsw.sqlite_lib_version()
    good = tuple(int(part) for part in version.split(".")) >= SQLITE
    need = ".".join(map(str, SQLITE))
    yield Check("sqlite", OK if good else FAIL, version if good else f"{version}: upgrade apsw to one with {need}")


def look_at_files(concurrency: int) -> Iterator[Check]:
    """The limit of open files: an episode that waits for a model holds one connection."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = concurrency + SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= need:
        yield Check("open files", OK, f"{soft:,} allowed, about {need:,} needed at concurrency {concurrency:,}")
    else:
        remedy = f"`ulimit -n {need}`" if hard == resource.RLIM_INFINITY or hard >= need else "raise the hard limit"
        yield Check("open files", WARN, f"{soft:,} allowed, chat at {concurrency:,} needs about {need:,}: {remedy}")


def look_at_environments(_: int) -> Iterator[Check]:
    """Which environments are ready."""
    from backends.environments.catalog import find, names

    for name in names():
        spec = find(name)
        ready = spec.installed
        finding = f"ready: {spec.interpreter()}" if ready else f"not installed: `rollout env install {name}`"
        yield Check(f"env {name}", OK if ready else WARN, finding)


def look_at_disk(_: int) -> Iterator[Check]:
    """Free space where runs, environments and sockets lie."""
    import tempfile

    from backends.environments.catalog import home

    for what, folder in (
        ("runs here", Path.cwd()),
        ("environments", home()),
        ("temporary", Path(tempfile.gettempdir())),
    ):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        writable = os.access(there, os.W_OK)
        state = FAIL if not writable else OK if free >= LOW_DISK else WARN
        finding = f"{free / 2**30:,.1f} GiB free in {there}"
        yield Check(f"disk, {what}", state, finding if writable else f"{there} is not writable: choose another folder")


def look_at_processes(_: int) -> Iterator[Check]:
    """Sandbox servers whose orchestrator is gone."""
    left = list(left_over_servers(Path("/proc")))
    if left:
        pids = " ".join(map(str, left))
        yield Check("left-over servers", WARN, f"{len(left)} without an orchestrator: `kill -9 {pids}`")
    else:
        yield Check("left-over servers", OK, "none")


def left_over_servers(proc: Path) -> Iterator[int]:
    """Sandbox servers of any user's that some process other than a Python has inherited. Those of containers have
    processes of their own, and their reaper."""
    for folder in proc.glob("[0-9]*"):
        try:
            if b"backends.server" not in (folder / "cmdline").read_bytes().split(b"\0"):
                continue
            if os.readlink(folder / "ns" / "pid") != os.readlink(proc / "self" / "ns" / "pid"):
                continue
            parent = (folder / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[1]
            owner = (proc / parent / "comm").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        if not owner.startswith(("python", "rollout", "pytest")):
            yield int(folder.name)


_LOOKS: Final[tuple[Callable[[int], Iterator[Check]], ...]] = (
    look_at_python,
    look_at_sqlite,
    look_at_files,
    look_at_environments,
    look_at_disk,
    look_at_processes,
    look_at_docker,
)
