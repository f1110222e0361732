"""Downloads an environment's data with its package's own command, and registers what came.

The command runs on the environment's interpreter, in an empty folder of its own, for a bounded time. What it leaves is
taken as data only where all that the declaration names is there; the folder is removed in any case.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from backends.environments.commands import last_lines, run, secluded
from backends.environments.data import register
from orchestrator.errors import Unavailable, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from backends.environments.catalog import EnvironmentSpec

DEADLINE_S: Final = 300.0


async def download(
    spec: EnvironmentSpec, base: Path, progress: Callable[[str], None], *, deadline_s: float = DEADLINE_S
) -> Path:
    """Download the data of an installed environment and register it below `base`; where it lies.

    Raises Unavailable with the end of what the command said and what to do instead. Cancelled: the command is killed
    and nothing is registered.
    """
    python = spec.interpreter()
    await asyncio.to_thread(base.mkdir, parents=True, exist_ok=True)
    folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix=".download-", dir=base))
    log = folder / "output.log"
    arrived = folder / "arrived"
    try:
        await asyncio.to_thread(arrived.mkdir)
        progress(f"{spec.name}: downloading with the package's own command ({' '.join(spec.download)})")
        with await asyncio.to_thread(log.open, "wb") as output:
            async with asyncio.timeout(deadline_s):
                status = await run([str(python), "-I", *spec.download], output, secluded(arrived), folder=arrived)
        if status != 0:
            raise await _failed(spec, f"the command ended with status {status}", log)
        try:
            return await asyncio.to_thread(register, spec, arrived, base, progress)
        except UsageError:
            raise await _failed(spec, "the command brought nothing that could be the data", log) from None
    except TimeoutError:
        raise await _failed(spec, f"it took more than {deadline_s:g} s", log) from None
    except OSError as error:
        raise await _failed(spec, str(error), log) from None
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


async def _failed(spec: EnvironmentSpec, why: str, log: Path) -> Unavailable:
    exact = next((name for name in spec.requirements if name.startswith(f"{spec.name}==")), spec.name)
    setup = f"python {' '.join(spec.setup)}; " if spec.setup else ""
    tail = await asyncio.to_thread(last_lines, log)
    return Unavailable(
        f"the data of {spec.name!r} could not be downloaded: {why}. On a machine with internet access do, in an empty "
        f"folder: pip install {exact}; {setup}python {' '.join(spec.download)}. Copy that folder here and register it "
        f"with `rollout env data {spec.name} --from FOLDER`{tail}"
    )
