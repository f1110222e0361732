"""Which tasks a split holds: `KIND`, or `KIND:SIDE`, or `SIDE` alone for the synthetic ones.

KIND is `synthetic` (the default; `webshop` means the same) or `human`; a task's number is WebShop's own index of the
goal. As WebShop's baselines do it, the first 500 goals are `test`, the next 1,000 `dev`, the others `train`; `val` is
`test` and `dev` together. Of fewer than 3,000 goals a fifth is held out, a third of that for `test`. Synthetic goals of
one product, with other options, may stand on both sides: that is WebShop's convention too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from backends.environments.webshop.shop import KINDS
from backends.server.environment import Tasks, unknown_split

if TYPE_CHECKING:
    from backends.environments.webshop.shop import Shop

SIDES: Final = ("train", "val", "test", "dev")
HELD_OUT: Final = 1500
_ENOUGH: Final = 3000


def resolve(shop: Shop, split: str) -> Tasks:
    """The tasks of a split; "" is the default. Raises EnvironmentFault."""
    kind, colon, side = split.partition(":")
    if kind in SIDES and not colon:
        kind, side = "", kind
    kind = KINDS[0] if kind in ("", "webshop") else kind
    if kind not in KINDS or side not in ("", *SIDES) or (colon and not side):
        raise unknown_split(split, [*KINDS, *SIDES, "each kind also with :train, :val, :test or :dev"])
    return Tasks([f"{kind}_{number}" for number in _numbers(len(shop.goals(kind)), side)])


def _numbers(count: int, side: str) -> range:
    held_out = HELD_OUT if count >= _ENOUGH else count // 5
    tested = held_out // 3
    return {
        "": range(count),
        "train": range(held_out, count),
        "val": range(held_out),
        "test": range(tested),
        "dev": range(tested, held_out),
    }[side]
