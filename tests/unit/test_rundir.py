"""The run directory: one owner at a time, found out by the lock; readers never disturb it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import orjson
import pytest

from orchestrator import rundir
from orchestrator.errors import RunBusy, UsageError
from orchestrator.rundir import Owner, RunDirectory

if TYPE_CHECKING:
    from pathlib import Path

HOLD = """
import sys
from orchestrator.rundir import RunDirectory
with RunDirectory(sys.argv[1]).claim():
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=10)


def test_claim_makes_the_folders_and_names_its_owner(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "a" / "run")
    assert directory.live_owner() is None
    with directory.claim():
        assert directory.journal.is_dir()
        assert directory.logs.is_dir()
        assert directory.live_owner() == os.getpid()
        assert Owner(**orjson.loads(directory.lock.read_bytes())) == Owner.current()
    assert directory.live_owner() is None


def test_second_claim_in_this_process_is_refused(tmp_path: Path) -> None:
    with RunDirectory(tmp_path).claim():
        with pytest.raises(RunBusy, match=str(os.getpid())), RunDirectory(tmp_path).claim():
            pass
        assert RunDirectory(tmp_path).live_owner() == os.getpid(), "a refused claim changed the owner's record"
    with RunDirectory(tmp_path).claim():
        pass


def test_claim_of_another_process_is_refused_and_ends_with_it(tmp_path: Path) -> None:
    process = hold(tmp_path)
    try:
        assert RunDirectory(tmp_path).live_owner() == process.pid
        with pytest.raises(RunBusy, match=f"process {process.pid}"), RunDirectory(tmp_path).claim():
            pass
        process.send_signal(signal.SIGKILL)
    finally:
        end(process)
    assert RunDirectory(tmp_path).live_owner() is None
    with RunDirectory(tmp_path).claim():
        assert RunDirectory(tmp_path).live_owner() == os.getpid()


def test_looking_never_makes_a_claim_fail(tmp_path: Path) -> None:
    process = hold(tmp_path)
    try:
        assert all(RunDirectory(tmp_path).live_owner() == process.pid for _ in range(100))
    finally:
        end(process)


def test_child_that_outlives_a_killed_owner_does_not_keep_the_lock(tmp_path: Path) -> None:
    script = HOLD.replace(
        'print("held"',
        'import subprocess; subprocess.Popen(["sh", "-c", "echo held; cat"], close_fds=False); print("", end=""',
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
        with RunDirectory(tmp_path).claim():
            pass
    finally:
        end(process)


def test_owner_is_told_apart_from_a_later_process_of_its_number() -> None:
    me = Owner.current()
    assert me.alive()
    assert not Owner(me.boot, me.pid, me.start + 1).alive()
    assert not Owner("another boot", me.pid, me.start).alive()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(timeout=10)
    assert not Owner(me.boot, gone.pid, 1).alive()
    assert not Owner(me.boot, 10**30, 1).alive(), "a label may hold any number"


def test_owner_whose_process_is_hidden_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a /proc with `hidepid` hides those of other users: nothing is read of them, but signals find them."""
    monkeypatch.setattr(rundir, "_start_of", lambda pid: None)
    me = Owner.current()
    assert Owner(me.boot, me.pid, 1).alive()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(timeout=10)
    assert not Owner(me.boot, gone.pid, 1).alive()


def test_half_written_record_is_nobody(tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(b'{"boot":"x","pi')
    assert RunDirectory(tmp_path).live_owner() is None
    (tmp_path / "lock").write_bytes(b'{"boot":"x"}')
    assert RunDirectory(tmp_path).live_owner() is None


def test_path_that_cannot_be_a_directory_is_the_callers_mistake(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="choose a writable one"), RunDirectory(file / "run").claim():
        pass
    with pytest.raises(UsageError, match="choose a writable one"), RunDirectory(file).claim():
        pass
    assert RunDirectory(file).live_owner() is None
