"""WebShop inside the sandbox: opens visits, lists tasks, and knows what to buy.

Options of `open`: `observation`, how pages are rendered (`text`, the default, or `text_rich`); `actions` (false):
whether every page is followed by the list of what can be clicked; `price_seed`, an integer (233): where prices are
ranges, what is drawn from them, and the goals' limits with it. The episode's own seed changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

from backends.environments.webshop import catalogue, pages, solutions, splits
from backends.environments.webshop.actions import TOOLSET
from backends.environments.webshop.goals import SHUFFLE_SEED
from backends.environments.webshop.session import Visit
from backends.environments.webshop.shop import Shop
from backends.server.environment import EnvironmentFault, Reply, Tasks, observation
from backends.server.wire import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from backends.server.environment import Environment

_OPTIONS: Final = ("actions", "observation", "price_seed")
_SYSTEM: Final = """\
You are shopping in a web shop. Find the product that the instruction asks for, choose the options that it names, and \
buy it; that ends the visit, and you are graded on what you bought. In every message take one action: call a tool, or \
write one line, search[words] or click[button]. Search from any page; click what the current page shows: a product's \
number, Next >, < Prev, Back to Search, an option's value, Description, Features, Reviews, Buy Now."""


class WebShop:
    """The shop of one data folder. One object serves all sessions of its process."""

    name: ClassVar[str] = "webshop"
    isolation: ClassVar[str] = "shared"
    deterministic: ClassVar[bool] = True
    runs_code: ClassVar[bool] = False
    max_turns: ClassVar[int] = 100

    def __init__(self, shop: Shop) -> None:
        self._shop = shop

    def tasks(self, split: str) -> Tasks:
        """The tasks of a split; see `splits`. Raises EnvironmentFault."""
        return splits.resolve(self._shop, split)

    def open(self, task: str, seed: int, options: Mapping[str, Any]) -> tuple[Visit, Reply]:
        """A fresh visit and its first page. Raises EnvironmentFault."""
        mode, listing, price_seed = _read(options)
        goals, number = self._shop.find(task)
        prices = goals.prices(price_seed).products
        visit = Visit(self._shop, goals.goal(number, price_seed), prices, mode=mode, listing=listing)
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": visit.text()}]
        return visit, Reply(observation(messages, toolset=TOOLSET), toolset=TOOLSET)

    def solution(self, task: str) -> Sequence[bytes]:
        """Actions that buy what a task asks for. Raises EnvironmentFault."""
        goals, number = self._shop.find(task)
        return solutions.moves(self._shop, goals.goal(number, SHUFFLE_SEED))


def _read(options: Mapping[str, Any]) -> tuple[str, bool, int]:
    if unknown := options.keys() - set(_OPTIONS):
        raise _refused(f"unknown option {min(unknown)!r}; webshop takes: {', '.join(_OPTIONS)}")
    mode = options.get("observation", pages.MODES[0])
    listing = options.get("actions", False)
    price_seed = options.get("price_seed", SHUFFLE_SEED)
    if mode not in pages.MODES:
        raise _refused(f"unknown observation {mode!r}; known: {', '.join(pages.MODES)}")
    if not isinstance(listing, bool):
        raise _refused("the option 'actions' must be true or false")
    if type(price_seed) is not int:
        raise _refused("the option 'price_seed' must be an integer")
    return mode, listing, price_seed


def _refused(why: str) -> EnvironmentFault:
    return EnvironmentFault(ErrorCode.BAD_REQUEST, why)


def environment() -> Environment:
    """What the server serves: the registered catalogue, else the shipped one."""
    return WebShop(Shop(catalogue.folder()))
