"""The thread that a connection to Ray is made in, and ended in.

Always true: it is one and the same from the first to the last, because the processes of a cluster of this machine's own
end with the thread that started them; nobody who leaves waits for it, because Ray may try to connect for many minutes,
and cannot be told to stop.
"""

from __future__ import annotations

import asyncio
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class RayThread:
    """See the module's docstring. Runs until `end`."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        threading.Thread(target=self._work, name="ray", daemon=True).start()

    async def call(self, function: Callable[[], object]) -> None:
        """Call it there; raises what it raises. Cancelled: it goes on."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def tell(error: Exception | None) -> None:
            if not done.done():
                done.set_result(None) if error is None else done.set_exception(error)

        def work() -> None:
            failed: Exception | None = None
            try:
                function()
            except Exception as error:  # noqa: BLE001  raised again where it is waited for
                failed = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(tell, failed)

        self._calls.put(work)
        await done

    def end(self, last: Callable[[], object] = bool) -> None:
        """End it after what has been asked, and `last`."""
        self._calls.put(last)
        self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
