"""AgentScope Runtime's own client classes, as published, against this project's server."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from serving import serving, solutions

from bench.reference import reference
from orchestrator.errors import Unavailable
from orchestrator.service import ServiceLimits

if TYPE_CHECKING:
    from bench.reference import Reference

pytestmark = pytest.mark.timeout(900)
TASKS = 50
SPLITS = (
    "multi_turn_base",
    "multi_turn_miss_func",
    "multi_turn_miss_param",
    "multi_turn_long_context",
    "simple_python",
)
SCRIPT = Path(__file__).with_name("agentscope_client.py")


@pytest.fixture(scope="module")
def installed() -> Reference:
    try:
        return asyncio.run(reference())
    except Unavailable as error:
        pytest.fail(str(error)) if os.environ.get("CI") == "true" else pytest.skip(str(error))


async def run(python: Path, how: str, url: str, given: Any, folder: Path) -> dict[str, Any]:
    environ = {"PATH": os.environ.get("PATH", ""), "HOME": str(folder), "LANG": "C.UTF-8", "BEARER": "t0ken"}
    process = await asyncio.create_subprocess_exec(
        str(python), str(SCRIPT), how, url, cwd=folder, env=environ,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, errors = await process.communicate(orjson.dumps(given))
    assert process.returncode == 0, errors.decode()[-3000:]
    return orjson.loads(out.splitlines()[-1])


@pytest.mark.parametrize("how", ["box", "box_async", "client"])
async def test_fifty_tasks_by_its_own_classes(installed: Reference, how: str, tmp_path: Path) -> None:
    tasks = [f"{split}_{number}" for split in SPLITS for number in range(TASKS // len(SPLITS))]
    known = await solutions("bfcl", tasks)
    tokens = None if how == "client" else {"user": "t0ken"}  # the client of the environment service knows no token
    async with serving("bfcl", tokens=tokens, limits=ServiceLimits()) as made:
        seen = await run(installed.python, how, made.url, known, tmp_path)
        assert seen["scores"] == dict.fromkeys(tasks, 1.0)
        assert seen["reports"] == dict.fromkeys(tasks, True)
        assert seen["first"] == "multi_turn_base_0"
        assert seen["released"] == TASKS
        assert made.health()["instances"] == made.health()["boxes"] == 0
