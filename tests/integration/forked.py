"""The environment `forked`, brought by a distribution that is laid out for the tests."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from backends.environments import toy
from orchestrator.testing.harness import say
from orchestrator.testing.leaks import processes

if TYPE_CHECKING:
    import pytest

    from orchestrator.protocols import Session

GONE_S = 3.0
SOURCES = Path(__file__).with_name("forked_environment")


def lay_out(site: Path, preload: str = "", *, runs_code: bool = False) -> Path:
    """Make a folder for `sys.path` that holds the distribution; `preload` is a statement more for the environment's.
    Where it `runs_code`, nothing that its sessions say is believed."""
    package = site / "forked_package" / "forked"
    shutil.copytree(SOURCES, package, ignore=shutil.ignore_patterns("__pycache__"))
    inside = (package / "inside.py").read_text(encoding="utf-8")
    changed = inside.replace("WARMED.append(os.getpid())", f"WARMED.append(os.getpid()); {preload}")
    if runs_code:
        changed = changed.replace('"process"\n', '"process"\n    runs_code: ClassVar[bool] = True\n', 1)
        declared = (package / "environment.toml").read_text(encoding="utf-8")
        declared = declared.replace("runs_code = false", "runs_code = true")
        (package / "environment.toml").write_text(declared, encoding="utf-8")
    (package / "inside.py").write_text(changed, encoding="utf-8")
    folder = Path(next(iter(toy.__path__)))
    shutil.copy(folder / "inside.py", package / "counting.py")
    dockerfile = (folder / "Dockerfile").read_text(encoding="utf-8")
    (package / "Dockerfile").write_text(dockerfile.replace('"toy"', '"forked"'), encoding="utf-8")
    info = site / "forked-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: forked\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[rollout.environments]\nforked = forked_package.forked\n", encoding="utf-8")
    return site


def bring(site: Path, patch: pytest.MonkeyPatch) -> None:
    """Let this process find it."""
    patch.syspath_prepend(str(site))


def alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    return any(process.pid == pid and process.state != "Z" for process in processes())


async def gone(*pids: int) -> None:
    """Wait until none of them runs. Raises TimeoutError."""
    async with asyncio.timeout(GONE_S):
        while any(alive(pid) for pid in pids):  # noqa: ASYNC110  # a process of somebody else's sets no event
            await asyncio.sleep(0.01)


async def told(session: Session, words: str) -> str:
    """What the environment says to these words."""
    return str(orjson.loads((await session.step(say(words))).body)["messages"][0]["content"])


async def number(session: Session, words: str) -> int:
    """The same, as a number."""
    return int(await told(session, words))
