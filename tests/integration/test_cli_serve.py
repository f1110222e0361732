"""The command `rollout serve`: its start, a run against it, a drain, both ends, a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from backends.sandboxes.private import sweep
from orchestrator.testing.leaks import processes

if TYPE_CHECKING:
    from collections.abc import Iterator

ROLLOUT = Path(sys.executable).with_name("rollout")


class Server:
    """A started `rollout serve`."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def post(self, route: str, **body: Any) -> tuple[int, Any]:
        request = urllib.request.Request(f"{self.url}/{route}", json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def sandboxes(self) -> list[int]:
        return [one.pid for one in processes() if one.parent == self.process.pid and "backends.server" in one.command]

    def ended(self) -> str:
        _, errors = self.process.communicate(timeout=20)
        return errors


@contextmanager
def server(*options: str, **variables: str) -> Iterator[Server]:
    command = [str(ROLLOUT), "serve", "--env", "toy", "--port", "0", *options]
    with subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **variables}
    ) as process:
        try:
            assert process.stdout is not None
            yield Server(process, process.stdout.readline().strip())
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.communicate(timeout=20)


def refused(*options: str, **variables: str) -> str:
    ended = subprocess.run(
        [str(ROLLOUT), "serve", *options], check=False, capture_output=True, text=True, timeout=60,
        env={**os.environ, **variables},
    )  # fmt: skip
    assert ended.returncode == 2
    return ended.stderr


def test_a_collection_against_a_served_environment(tmp_path: Path) -> None:
    with server("--env", "bfcl") as served:
        out = str(tmp_path / "run")
        command = [str(ROLLOUT), "collect", "--env", "bfcl", "--backend", "remote", "--url", served.url, "--policy",
                   "replay", "--episodes", "40", "--out", out, "--json"]  # fmt: skip
        ended = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        assert json.loads(ended.stdout.splitlines()[-1])["reward_one"] == 40
        served.process.send_signal(signal.SIGTERM)
        assert "draining: 0 instances" in served.ended()
        assert served.process.returncode == 0


def test_the_first_signal_drains_and_the_second_ends() -> None:
    with server() as served:
        assert served.post("create", task_id="toy_0", instance_id="a")[0] == 200
        sandboxes = served.sandboxes()
        assert sandboxes
        served.process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 10
        while served.post("create", task_id="toy_0")[0] != 503:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        step = {"role": "assistant", "content": "add 1"}
        assert served.post("step", instance_id="a", messages=step)[0] == 200
        served.process.send_signal(signal.SIGINT)
        assert "draining: 1 instances" in served.ended()
        assert served.process.returncode == 0
        assert not {one.pid for one in processes()} & set(sandboxes)


def test_signals_until_it_is_gone_make_no_failure_of_its_end() -> None:
    with server() as served:
        while served.process.poll() is None:
            served.process.send_signal(signal.SIGTERM)
            time.sleep(0.002)
        assert (served.process.returncode, served.ended().splitlines()[-1]) == (0, "ended")


def test_a_killed_server_leaves_no_sandbox() -> None:
    with server() as served:
        sandboxes = set(served.sandboxes())
        assert sandboxes
        served.process.kill()
        served.ended()
        deadline = time.monotonic() + 10
        while {one.pid for one in processes()} & sandboxes:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    sweep()  # as whoever starts sandboxes next does


def test_what_sandboxes_say_is_kept_where_asked_for(tmp_path: Path) -> None:
    with server("--logs", str(tmp_path / "logs")) as served:
        assert served.post("create", task_id="open_error")[0] == 500
        assert len(list((tmp_path / "logs").iterdir())) == 2
    assert "--logs /proc/none: No such file" in refused("--env", "toy", "--logs", "/proc/none")


def test_a_token_from_the_environment_is_asked_for() -> None:
    with server(BEARER_TOKEN="s3cret") as served:
        assert served.post("create", task_id="toy_0") == (401, {"detail": "Authentication required"})
        assert b"s3cret" not in Path(f"/proc/{served.process.pid}/cmdline").read_bytes()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--env", "toi"), "did you mean 'toy'"),
        (("--env", "toy", "--host", "0.0.0.0"), "ask for a token"),
        (("--env", "toy", "--token-env", "NO_SUCH_VARIABLE"), "NO_SUCH_VARIABLE holds no token"),
        (("--env", "toy", "--host", "192.0.2.1", "--insecure"), "cannot listen"),
        ((), "Missing option '--env'"),
    ],
)
def test_what_cannot_be_served_says_what_to_do(options: tuple[str, ...], says: str) -> None:
    assert says in refused(*options)
