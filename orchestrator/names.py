"""What to say when a name does not exist: the nearest known one, then all of them."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from orchestrator.errors import UnknownName

if TYPE_CHECKING:
    from collections.abc import Iterable


def unknown(what: str, name: str, known: Iterable[str]) -> UnknownName:
    """The error for an unknown `what` (environment, policy, ...) called `name`."""
    names = sorted(map(str, known))  # members of a StrEnum too
    close = get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return UnknownName(f"unknown {what} {name!r}{hint} known: {', '.join(names) or 'none'}")
