"""Interrupting the command: a drain, a cancellation, a kill, a terminal, a full disk; afterwards nothing is missing."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from orchestrator.errors import UsageError
from orchestrator.run import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROLLOUT = Path(sys.executable).with_name("rollout")
EPISODES = 128
HELD = 6
"""Stored at least, when every place is taken by an episode that waits for the file `go`."""
NOT_BEGUN = [
    "cancelling: the run has not begun, there is nothing to drain",
    "cancelled before the run had begun",
]
SCRIPT = """
import asyncio
from pathlib import Path

async def act(view, ctx):
    while ctx.key.sample == 1 and not Path(__file__).with_name("go").exists():
        await asyncio.sleep(0.02)
    return "add 1" if view.turn < 5 else "stop"
"""
SPIN = """
from pathlib import Path

def act(view, ctx):
    Path(__file__).with_name("in").touch()
    while True:
        pass
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A run into `run` that comes to a stand, eight episodes in flight, until there is a file `go`."""
    (tmp_path / "mine.py").write_text(SCRIPT, encoding="utf-8")
    return [
        "collect", "--env", "toy", "--policy", "scripted", "--script", f"{tmp_path}/mine.py:act", "--group-size",
        str(EPISODES // 64), "--concurrency", "8", "--sandboxes", "2", "--out", f"{tmp_path}/run", "--json",
    ]  # fmt: skip


@pytest.fixture
def free(arguments: list[str], tmp_path: Path) -> list[str]:
    """The same run, not held."""
    (tmp_path / "go").touch()
    return arguments


@contextmanager
def started(home: Path, arguments: list[str], **more: Any) -> Iterator[subprocess.Popen[str]]:
    """The command, running; killed at the end if it has not ended."""
    environ = os.environ | {"ROLLOUT_HOME": str(home)}
    pipe = subprocess.PIPE
    options: dict[str, Any] = {"stdout": pipe, "stderr": pipe, "env": environ} | more
    with subprocess.Popen([ROLLOUT, *arguments], text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(home: Path, run: Path) -> dict[str, Any]:
    """Resume a run to its end; its summary."""
    with started(home, ["resume", str(run), "--json"]) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    summary: dict[str, Any] = json.loads(stdout)
    return summary


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Look often; the deadline is far."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"waited 30 s for {what}"
        time.sleep(0.01)


def stored(run: Path) -> int:
    if not (run / "run.sqlite").exists():
        return 0
    try:
        with Run.open(run) as opened:
            return opened.totals().episodes
    except UsageError:  # it is just being made
        return 0


def keys(run: Path) -> list[str]:
    with Run.open(run) as opened:
        return [str(trajectory.key) for trajectory in opened.episodes()]


def servers_of(pid: int) -> list[int]:
    """The sandbox servers that are this process's children."""
    found = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid=,args="], capture_output=True, text=True, check=False)
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "backends.server" in line]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_drains_and_resume_collects_the_rest(
    home: Path, arguments: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    with started(home, arguments) as process:
        wait_until(lambda: stored(run) >= HELD, "some episodes")
        process.send_signal(number)
        assert process.stderr is not None
        assert process.stderr.readline().startswith("draining: running episodes are finished")
        (tmp_path / "go").touch()
        stdout, stderr = process.communicate(timeout=30)
    summary = json.loads(stdout)
    assert process.returncode == 3, stderr
    assert f"`rollout resume {run}` goes on" in stderr
    assert (summary["state"], summary["outcomes"]) == ("unfinished", {"completed": summary["episodes"]})
    assert HELD + 8 <= summary["episodes"] < EPISODES
    whole = finish(home, run)
    assert (whole["state"], whole["episodes"], whole["duplicates"]) == ("finished", EPISODES, 0)
    assert len(set(keys(run))) == EPISODES


def test_a_second_signal_cancels_at_once(home: Path, arguments: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(home, arguments) as process:
        wait_until(lambda: stored(run) >= HELD, "some episodes")
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert "draining" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert "cancelling" in stderr
    assert f"cancelled before the end: `rollout resume {run}` goes on" in stderr
    assert json.loads(stdout)["state"] == "unfinished"
    (tmp_path / "go").touch()
    assert finish(home, run)["outcomes"] == {"completed": EPISODES}


def test_a_signal_before_the_run_has_begun_ends_it(home: Path, arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n" + SCRIPT, "utf-8")
    with started(home, arguments) as process:
        stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (130, "")
    assert stderr.splitlines() == NOT_BEGUN


def test_a_signal_while_the_run_is_prepared_cancels_it_at_once(
    home: Path, arguments: list[str], tmp_path: Path
) -> None:
    log = tmp_path / "run" / "logs" / "rollout.log"
    with started(home, [*arguments, "--task-id", "open_hang", "--step-timeout", "100"]) as process:
        wait_until(lambda: log.exists() and "answers after" in log.read_text("utf-8"), "the first sandbox")
        servers = servers_of(process.pid)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (130, "")
    assert stderr.splitlines() == NOT_BEGUN
    assert servers
    wait_until(lambda: all(map(gone, servers)), "the servers to end")


def test_a_third_signal_ends_a_run_whose_policy_holds_the_loop(
    home: Path, arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(SPIN, encoding="utf-8")
    with started(home, arguments) as process:
        wait_until((tmp_path / "in").exists, "the policy")
        servers = servers_of(process.pid)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            time.sleep(0.1)  # else the system may take two of a kind for one
            assert process.poll() is None
            process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (130, "")
    assert stderr == f"ended at once; what was stored is kept: `rollout resume {tmp_path}/run` goes on\n"
    assert len(servers) == 2
    wait_until(lambda: all(map(gone, servers)), "the servers to die with their orchestrator")
    (tmp_path / "mine.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "go").touch()
    assert finish(home, tmp_path / "run")["outcomes"] == {"completed": EPISODES}


def test_a_kill_leaves_no_server_and_loses_nothing(home: Path, arguments: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(home, arguments) as process:
        wait_until(lambda: stored(run) >= HELD, "some episodes")
        servers = servers_of(process.pid)
        process.kill()
        process.communicate(timeout=30)
    assert len(servers) == 2
    wait_until(lambda: all(map(gone, servers)), "the servers to die with their orchestrator")
    before = set(keys(run))
    with started(home, ["status", str(run), "--json"]) as process:
        stdout, stderr = process.communicate(timeout=30)
    assert json.loads(stdout)["state"] == "unfinished"
    assert "no process works on it" in stderr
    (tmp_path / "go").touch()
    whole = finish(home, run)
    assert (whole["episodes"], whole["duplicates"]) == (EPISODES, 0)
    after = keys(run)
    assert len(after) == len(set(after)) == EPISODES
    assert before < set(after)


def test_a_directory_in_use_is_refused_and_its_owner_named(home: Path, arguments: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(home, arguments) as process:
        wait_until(lambda: stored(run) >= 1, "the first episode")
        for command in (arguments, ["resume", str(run)]):
            with started(home, command) as second:
                _, stderr = second.communicate(timeout=30)
            assert second.returncode == 2, stderr
            assert f"is in use by process {process.pid}" in stderr
        with started(home, ["status", str(run), "--json"]) as look:
            status = json.loads(look.communicate(timeout=30)[0])
        assert (status["state"], status["pid"], status["planned"]) == ("running", process.pid, EPISODES)
        (tmp_path / "go").touch()
        stdout, _ = process.communicate(timeout=30)
    assert json.loads(stdout)["episodes"] == EPISODES


def test_on_a_narrow_terminal_progress_is_live_and_fits(home: Path, arguments: list[str], tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    environ = os.environ | {"ROLLOUT_HOME": str(home), "TERM": "xterm-256color"}
    environ.pop("COLUMNS", None)
    with (
        started(home, arguments, stdin=theirs, stderr=theirs, env=environ) as process,
        closing(os.fdopen(ours, "rb", 0)),
    ):
        os.close(theirs)
        screen = read_terminal(ours, until=f"of {EPISODES} episodes")
        (tmp_path / "go").touch()
        screen += read_terminal(ours)
        stdout, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert json.loads(stdout)["episodes"] == EPISODES
    assert f"of {EPISODES} episodes" in screen
    assert "in flight" in screen
    assert "sandboxes  2 of 2" in screen
    assert "Traceback" not in screen


def read_terminal(file: int, until: str = "\0") -> str:
    """All that is written to the other end until a text has come or it is closed."""
    seen = b""
    try:
        while until.encode() not in seen and (part := os.read(file, 65536)):
            seen += part
    except OSError:  # Linux reports a closed other end so
        pass
    return seen.decode()


def test_a_reader_who_goes_away_does_not_end_the_run(home: Path, free: list[str], tmp_path: Path) -> None:
    with started(home, free) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()
        process.wait(30)
    assert stored(tmp_path / "run") == EPISODES
    assert finish(home, tmp_path / "run")["state"] == "finished"


def test_a_store_that_cannot_grow_stops_the_run_and_loses_nothing(home: Path, free: list[str], tmp_path: Path) -> None:
    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    run = tmp_path / "run"
    with started(home, free, preexec_fn=bound) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    assert not stdout
    assert "Traceback" not in stderr
    assert "rollout resume" in stderr
    kept = set(keys(run))
    whole = finish(home, run)
    assert (whole["episodes"], whole["duplicates"]) == (EPISODES, 0)
    assert kept <= set(keys(run))
