"""Where environments lie: the project's own folders, and packages of others named by entry points.

An entry point of the group `rollout.environments` has the environment's name and, as its value, the package that holds
its files: `mygame = "mypackage.mygame"`. The package is located, never imported (its parents are, as Python must).
"""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

FOLDER: Final = Path(__file__).parent
"""Where the environments of the project lie."""
DECLARATION: Final = "environment.toml"
GROUP: Final = "rollout.environments"
BUILT_IN: Final = "built in"
NAME: Final = re.compile(r"[a-z][a-z0-9_]*")
"""What an environment may be called."""


class Place(NamedTuple):
    """Where one environment is declared. `entry` is None for the project's own."""

    name: str
    entry: EntryPoint | None

    @property
    def source(self) -> str:
        """Who brings it."""
        if self.entry is None:
            return BUILT_IN
        return self.entry.dist.name if self.entry.dist is not None else self.entry.value

    def folder(self) -> Path:
        """The folder that holds its declaration. Raises UsageError where an entry point names none."""
        if self.entry is None:
            return FOLDER / self.name
        try:
            spec = find_spec(self.entry.value)
        except (ImportError, ValueError) as error:
            raise self._wrong(str(error)) from None
        for location in (spec.submodule_search_locations or ()) if spec is not None else ():
            if (Path(location) / DECLARATION).is_file():
                return Path(location)
        raise self._wrong(f"no package {self.entry.value!r} with an {DECLARATION} can be found")

    def _wrong(self, why: str) -> UsageError:
        return UsageError(f"environment {self.name!r}, an entry point of {self.source}: {why}; install it again")


def places() -> dict[str, Place]:
    """Every environment by name, sorted. Raises UsageError for a name that cannot be one, or is taken twice."""
    found = {path.parent.name: Place(path.parent.name, None) for path in FOLDER.glob(f"*/{DECLARATION}")}
    for entry in entry_points(group=GROUP):
        place = Place(entry.name, entry)
        if not NAME.fullmatch(entry.name):
            raise UsageError(
                f"{place.source} names an environment {entry.name!r}: lower-case letters, digits and _ only"
            )
        if (other := found.get(entry.name)) is not None and (other.entry is None or other.entry != entry):
            raise UsageError(
                f"environment {entry.name!r} is brought by {other.source} and by {place.source}: rename one"
            )
        found[entry.name] = place
    return dict(sorted(found.items()))
