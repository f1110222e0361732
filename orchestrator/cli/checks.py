"""What `rollout doctor` says of one thing that it has looked at."""

from typing import Final, NamedTuple

OK: Final = "ok"
WARN: Final = "warn"
FAIL: Final = "FAIL"


class Check(NamedTuple):
    """One finding: what was looked at, `ok`, `warn` or `FAIL`, and what it means."""

    what: str
    state: str
    finding: str
