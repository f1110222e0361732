"""Whose a container is where its owner's processes cannot be seen: an owner lives as long as it renews its lease."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from elsewhere import ROLLOUT, another_machine

from orchestrator.testing.leaks import children

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest
    from elsewhere import Elsewhere

LEASE_S = 3.0
GONE_S = 20.0
_OWNER = [sys.executable, str(Path(__file__).with_name("lasting_owner.py"))]


@contextmanager
def owner(*prefix: str) -> Iterator[subprocess.Popen[bytes]]:
    """One that has its two sandboxes, by way of one outpost."""
    with subprocess.Popen([*prefix, *_OWNER, str(LEASE_S)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            yield process
        finally:
            process.kill()


def until(holds: Callable[[], bool]) -> None:
    """Wait for it, for as long as a loaded machine may take."""
    ends = time.monotonic() + GONE_S
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.1)


def reap() -> list[str]:
    """The containers that `rollout reap` removes on this machine."""
    done = subprocess.run([ROLLOUT, "reap", "--json"], capture_output=True, check=True)
    removed: list[str] = json.loads(done.stdout)["removed"]
    return removed


def kill_reaper(process: subprocess.Popen[bytes]) -> None:
    """While the owner cannot start another."""
    process.send_signal(signal.SIGSTOP)
    [reaper] = [child.pid for child in children(process.pid) if "docker.reaper" in child.command]
    os.kill(reaper, signal.SIGKILL)


def test_a_killed_owner_leaves_nothing(far: Elsewhere) -> None:
    with owner() as process:
        assert len(far.containers()) == 3
        process.kill()
        process.wait()
        until(lambda: far.containers() == [])


def test_an_owner_of_another_machine_is_known_alive_by_its_lease(far: Elsewhere, tmp_path: Path) -> None:
    """It is left alone while it renews it, and when it is killed with its reaper others remove what it has left."""
    with owner() as process:
        theirs = far.containers()
        time.sleep(1.5 * LEASE_S)
        assert far.reap_as_another_machine(tmp_path)["removed"] == []
        assert sorted(far.containers("--filter", "status=running")) == sorted(theirs)
        kill_reaper(process)
        process.kill()
        process.wait()
        until(lambda: far.containers("--filter", "status=running") == [])
        said = far.reap_as_another_machine(tmp_path)
        assert (sorted(said["removed"]), said["left"], said["unknown"]) == (sorted(theirs), [], [])
        assert far.containers() == []
    reap()


def test_a_silent_owner_is_dead_when_its_lease_has_run_out(far: Elsewhere, tmp_path: Path) -> None:
    """As a machine is that has lost its power: no connection ends. What serves it ends by itself; another machine's
    orchestrators remove it, and this one's, which see that it lives, do not."""
    with owner() as process:
        theirs = sorted(far.containers())
        process.send_signal(signal.SIGSTOP)
        until(lambda: far.containers("--filter", "status=running") == [])
        assert reap() == []
        assert sorted(far.containers()) == theirs
        assert sorted(far.reap_as_another_machine(tmp_path)["removed"]) == theirs
        process.kill()


def test_an_orchestrator_clears_what_a_dead_machine_has_left(far: Elsewhere, tmp_path: Path) -> None:
    with owner(*another_machine(tmp_path)) as process:
        theirs = set(far.containers())
        kill_reaper(process)
        process.kill()
        process.wait()
        assert theirs & set(far.containers()) == theirs, "nobody has looked yet"
        with owner() as other:
            until(lambda: not theirs & set(far.containers()))
            assert len(far.containers()) == 3
            other.kill()
            until(lambda: far.containers() == [])
    reap()


def test_who_reaches_a_daemon_by_a_forwarded_socket_sees_no_owner_there(
    far: Elsewhere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `ssh -L /tmp/far.sock:/var/run/docker.sock far` lays it: the path is this machine's, the daemon is not. The
    owner beside it has no lease; what runs is of no earlier boot, so nobody may take it for dead."""
    monkeypatch.setenv("DOCKER_HOST", far.daemon.url)
    with owner() as process:
        theirs = sorted(far.containers())
        said = json.loads(subprocess.check_output([*another_machine(tmp_path), ROLLOUT, "reap", "--json"]))
        assert (said["removed"], sorted(said["unknown"])) == ([], theirs)
        assert sorted(far.containers("--filter", "status=running")) == theirs
        process.kill()
        process.wait()
        until(lambda: far.containers() == [])
