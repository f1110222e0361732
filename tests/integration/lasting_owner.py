"""An owner of two sandboxes on whichever Docker daemon the environment names: says `up`, and stays until it is killed.

python lasting_owner.py LEASE_S
"""

from __future__ import annotations

import asyncio
import sys

from backends.sandboxes.docker import DockerBackend
from orchestrator.types import RunId


async def main() -> None:
    backend = DockerBackend("toy", lease_s=float(sys.argv[1]))
    backend.configure(run=RunId("lasting"), with_solutions=False, logs=None, call_limit_s=5.0)
    async with backend:
        for _ in range(2):
            await backend.create()
        sys.stdout.write("up\n")
        sys.stdout.flush()
        await asyncio.sleep(600)


if __name__ == "__main__":
    asyncio.run(main())
