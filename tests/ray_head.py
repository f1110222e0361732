"""A Ray head of the tests' own, as `ray start` makes it, in processes of its own; a test's process is not connected."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

RAY: Final = Path(sys.executable).with_name("ray")
START_S: Final = 60.0
END_S: Final = 30.0


def need_ray() -> None:
    """Skip visibly without Ray, or fail where it is required."""
    if not RAY.exists():
        message = "Ray is not installed: pip install 'rollout-orchestrator[ray]'"
        pytest.fail(message) if os.environ.get("ROLLOUT_REQUIRE_RAY") == "1" else pytest.skip(message)


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@contextmanager
def ray_head(folder: Path, *options: str, **variables: str) -> Iterator[str]:
    """The address of a head whose files lie in `folder`, which must have a short path; up when this is entered."""
    need_ray()
    address = f"127.0.0.1:{free_port()}"
    where = ["--node-ip-address=127.0.0.1", f"--port={address.rpartition(':')[2]}", f"--temp-dir={folder}"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **variables}
    log = folder.with_suffix(".log")
    with log.open("wb") as output:  # what an earlier head has said does not count
        process = subprocess.Popen(
            [str(RAY), "start", "--head", "--block", *where, *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
        )
    try:
        ends = time.monotonic() + START_S
        while b"Ray runtime started" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > ends:
                pytest.fail(log.read_text(encoding="utf-8"))
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(END_S)
