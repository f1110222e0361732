"""The node that an actor runs on, as the actor sees it.

A worker whose node has been killed (its raylet, that is) is not ended by Ray while it has a call under way: it would go
on for as long as it likes, while the cluster believes it dead. So actors of ours look.
"""

from __future__ import annotations

import asyncio
import os
from typing import Final

LOOK_S: Final = 0.5
"""How often an actor looks whether its node is there."""


async def gone() -> None:
    """Until the raylet that started this process has ended."""
    raylet = os.getppid()
    while True:
        await asyncio.sleep(LOOK_S)
        if os.getppid() != raylet:
            return
