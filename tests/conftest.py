"""What every test is held to: it blocks no event loop and leaves nothing behind.

Held around each test, by fixtures that nobody asks for: blocking calls made by the project inside a running loop are
errors (but for the whitelist, with reasons); a test leaves no unfinished task, open file, child process, server or
private directory. All private directories of the suite lie in one folder of its own, so that what is left behind is
known to be ours, even where its owner was killed.
"""

from __future__ import annotations

import asyncio
import gc
import shutil
import signal
import tempfile
import time
from inspect import iscoroutinefunction
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from blockbuster import blockbuster_ctx

from orchestrator.testing.leaks import Held, Process, processes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

SETTLE_S = 3.0
"""What was told to end gets this long to be gone."""

MAY_BLOCK = {
    # A few calls to the local disk when a run, a backend or a sandbox begins or ends; never one a step.
    "orchestrator/facade.py": {"__aenter__"},
    "orchestrator/journal.py": {"start"},
    "orchestrator/rundir.py": {"claim", "live_owner", "_owner"},
    "orchestrator/store/schema.py": {"create", "open_writer", "open_reader", "open_consumer", "holds_run"},
    "backends/environments/catalog.py": {"find", "stage", "_sources", "installed"},
    "backends/sandboxes/local.py": {"__aenter__", "_spawn", "destroy"},
    "backends/sandboxes/process.py": {"spawn", "children_of", "cpu_of", "labelled"},
    "backends/sandboxes/listener.py": {"__aenter__", "__aexit__", "open", "shut"},
    "backends/sandboxes/docker/port.py": {"connect", "read"},
    "backends/sandboxes/docker/usage.py": {"_paths", "_number", "_field", "first_child"},
    "backends/sandboxes/docker/owners.py": {"owner_labels", "standing"},
    "backends/sandboxes/private.py": {"private_directory"},
    # Log records and tracebacks are written where they arise.
    "logging/__init__.py": {"emit"},
    # The name of a socket that is about to be opened.
    "asyncio/unix_events.py": {"create_unix_server"},
}


def pytest_configure() -> None:
    """Children begin with the signal handlers of a terminal's, also where the suite was started by `nohup` or `&`."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def private_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the suite's own processes put their sockets and temporary files: a short path, for sockets."""
    tmp_path_factory.getbasetemp()  # tests' own folders stay where pytest puts them
    folder = Path(tempfile.mkdtemp(prefix="rt-"))
    asyncio.set_event_loop(None)  # else the first async test would find, and leave, a loop that nobody asked for
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        patch.setattr(tempfile, "tempdir", str(folder))
        yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest, private_folder: Path) -> Iterator[None]:
    """No file descriptor, child process, server or private directory outlives its test.

    Ray keeps connections of its own in a process that is connected to a cluster.
    """
    sockets = "cluster" not in request.fixturenames
    before, untouched = Held.now(), private_folder.stat().st_mtime_ns
    yield
    ends = time.monotonic() + SETTLE_S
    while left := Held.now().new(before, sockets=sockets) + _residue(private_folder, untouched):
        if time.monotonic() > ends:
            for entry in private_folder.iterdir():
                shutil.rmtree(entry, ignore_errors=True)  # one test's fault is not the next one's
            pytest.fail(f"left behind: {'; '.join(left)}")
        gc.collect()
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def no_blocking(request: pytest.FixtureRequest) -> Iterator[None]:
    """No call of the project blocks a running loop, but for MAY_BLOCK."""
    if not iscoroutinefunction(getattr(request, "function", None)):
        yield
        return
    project, kits = ["orchestrator", "backends", "policies", "bench"], ["orchestrator.testing"]
    with blockbuster_ctx(project, excluded_modules=kits) as blockbuster:
        for function in blockbuster.functions.values():
            for file, names in MAY_BLOCK.items():
                function.can_block_in(file, names)
        yield


@pytest.fixture(autouse=True)
def no_tasks_left(request: pytest.FixtureRequest) -> None:
    """No task outlives an async test."""
    if iscoroutinefunction(getattr(request, "function", None)):
        request.getfixturevalue("_tasks_watched")


@pytest.fixture
async def _tasks_watched() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if left:
        await asyncio.wait(left, timeout=0.1)  # those that were cancelled get their turn
    names = [task.get_name() for task in left if not task.done()]
    assert not names, f"tasks left behind: {names}"


def _residue(folder: Path, untouched: int) -> list[str]:
    """Processes that live in the suite's folder, and what they or their owners have left in it."""
    if folder.stat().st_mtime_ns == untouched:
        return []  # nobody has been there
    alive = [f"process {found.pid}: {found.command}" for found in processes() if _lives_in(folder, found)]
    return alive + [f"directory {entry.name}" for entry in folder.iterdir() if entry.name.startswith("rollout-")]


def _lives_in(folder: Path, process: Process) -> bool:
    try:
        return process.state != "Z" and Path(f"/proc/{process.pid}/cwd").readlink().is_relative_to(folder)
    except OSError:
        return False  # it ended meanwhile
