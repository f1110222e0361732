"""One shop: products, search and goals, shared by every session of the process and never changed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from backends.environments.webshop.catalogue import HUMAN, load
from backends.environments.webshop.goals import Goals
from backends.environments.webshop.index import Index
from backends.server.environment import unavailable, unknown_task

if TYPE_CHECKING:
    from pathlib import Path

RESULTS: Final = 50
"""A search finds this many products at most."""
KINDS: Final = ("synthetic", "human")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,11}")


class Shop:
    """The shop of one folder of data. Raises EnvironmentFault where the data cannot be used."""

    def __init__(self, source: Path) -> None:
        self.products = load(source)
        self.places = {product.asin: place for place, product in enumerate(self.products)}
        self._index = Index((product.indexed for product in self.products), list(self.places))
        self._goals = {kind: Goals(self.products, human=kind == "human") for kind in KINDS}

    def search(self, words: str) -> tuple[int, ...]:
        """The places of the best products, best first."""
        return self._index.top(words, RESULTS)

    def goals(self, kind: str) -> Goals:
        """The goals of one of KINDS. Raises EnvironmentFault where the data has none."""
        goals = self._goals[kind]
        if not goals:
            needs = f"{HUMAN} in the data folder" if kind == "human" else "instructions in the data"
            raise unavailable(kind, f"{needs}; run `rollout env data webshop --from DIR` with it")
        return goals

    def find(self, task: str) -> tuple[Goals, int]:
        """The goals that a task belongs to, and its number. Raises EnvironmentFault."""
        kind, _, number = task.rpartition("_")
        if kind not in KINDS or _NUMBER.fullmatch(number) is None:
            raise unknown_task(task, "ids look like synthetic_0 or human_0; list them by split")
        goals = self.goals(kind)
        if int(number) >= len(goals):
            raise unknown_task(task, f"the last one is {kind}_{len(goals) - 1}")
        return goals, int(number)
