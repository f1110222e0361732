"""kill -9 of the orchestrator at random points, twenty times, half of them while a model is being called.

The command of the benchmark does the killing and the counting, so that what is tested is what users can run; its
checker is itself tested in `tests/integration/test_bench.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from backends.environments.catalog import find

KILLS = 20


@pytest.mark.chaos
@pytest.mark.timeout(420)
def test_twenty_kills_lose_nothing_and_repeat_no_model_call(tmp_path: Path) -> None:
    if not find("bfcl").installed:
        if os.environ.get("CI"):
            pytest.fail("BFCL is not installed: `rollout env install bfcl`")
        pytest.skip("BFCL is not installed: `rollout env install bfcl`")
    command = [Path(sys.executable).with_name("rollout"), "bench", "recovery", "--kills", str(KILLS)]
    sizes = ["--episodes", "1500", "--seed", "7", "--out", str(tmp_path / "recovery.json"), "--json"]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    wrong = {name: result[name] for name in ("lost", "duplicated", "unexpected", "wrong_rewards", "processes_left")}
    assert wrong == dict.fromkeys(wrong, 0)
    assert result["model_calls_repeated"] == 0
    assert result["kills"] == KILLS
    assert result["kills_in_flight"] >= KILLS // 4, "most kills found nothing running: the runs are too short"
    assert result["model_calls"] > 0
