"""One buyer's visit: a page, what led to it, and what was bought.

Owns a few small values; products, results and goals are the shop's. Always true: on a product's page `_product` is set;
options belong to that product; nothing changes after the purchase. As in WebShop a search is possible on every page,
clears the chosen options, and what cannot be clicked changes nothing: the same page is the answer. A tool call is told
so; text gets the page alone, as upstream gives it. Only the purchase carries a reward.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

import orjson

from backends.environments.webshop import actions, pages, reward
from backends.server.environment import EnvironmentFault, Grade, Reply, observation
from backends.server.wire import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from backends.environments.webshop.actions import Move
    from backends.environments.webshop.catalogue import Product
    from backends.environments.webshop.goals import Goal
    from backends.environments.webshop.pages import Piece
    from backends.environments.webshop.shop import Shop


class Page(Enum):
    """Where the buyer is."""

    START = 0
    RESULTS = 1
    ITEM = 2
    SUB_PAGE = 3
    BOUGHT = 4


_SUB_PAGES = {name.lower(): name for name in pages.SUB_PAGES}


class Visit:
    """An episode. `prices` is what each product costs in it, by place; `listing`: whether pages list their buttons."""

    __slots__ = (
        "_chosen", "_details", "_goal", "_listing", "_looked_at", "_mode", "_number", "_page", "_prices", "_product",
        "_results", "_reward", "_shop", "_sub_page",
    )  # fmt: skip

    def __init__(self, shop: Shop, goal: Goal, prices: Sequence[float], *, mode: str, listing: bool) -> None:
        self._shop = shop
        self._goal = goal
        self._prices = prices
        self._mode = mode
        self._listing = listing
        self._reward = 0.0
        self._details: dict[str, Any] = {"bought": None}
        self._page = Page.START
        self._results: tuple[int, ...] = ()
        self._number = 1
        self._product: Product | None = None
        self._sub_page = ""
        self._chosen: dict[str, str] = {}
        self._looked_at: tuple[str, ...] = ()

    def step(self, action: bytes) -> Reply:
        """Answer one assistant message with the page that it leads to."""
        moves = actions.read(action)
        if isinstance(moves, str):
            return self._reply([{"role": "user", "content": f"Error: {moves}"}])
        if moves and moves[0].call:
            answers = [(move.call, self._called(move)) for move in moves]
            return self._reply([{"role": "tool", "tool_call_id": call, "content": text} for call, text in answers])
        for move in moves:
            self._move(move)
        return self._reply([{"role": "user", "content": self.text()}])

    def evaluate(self, params: Mapping[str, Any]) -> Grade:
        """The purchase's reward, 0.0 before it. Raises EnvironmentFault for an unknown parameter.

        `sparse` is accepted and changes nothing: the reward comes with the purchase alone.
        """
        if unknown := params.keys() - {"sparse"}:
            raise EnvironmentFault(ErrorCode.BAD_REQUEST, f"unknown parameter {min(unknown)!r}; evaluate takes: sparse")
        return Grade(self._reward, self._details)

    def close(self) -> None:
        """Nothing to free: all that a visit holds goes with it."""

    def text(self) -> str:
        """The current page as an observation."""
        page = self._pieces()
        text = pages.render(page, self._mode)
        if not self._listing:
            return text
        buttons = {"has_search_bar": self._page is Page.START, "clickables": list(pages.pressable(page))}
        return f"{text}\n\nAvailable Actions:\n{orjson.dumps(buttons).decode()}"

    def _reply(self, messages: list[dict[str, Any]]) -> Reply:
        done = self._page is Page.BOUGHT
        return Reply(observation(messages), self._reward if done else 0.0, done)

    def _called(self, move: Move) -> str:
        if move.problem:
            return f"Error: {move.problem}"
        if self._page is Page.BOUGHT:
            return "Error: the purchase is made; nothing more can be done"
        if self._move(move):
            return self.text()
        return f"Error: there is nothing to click called {move.argument[:100]!r} on this page\n{self.text()}"

    def _move(self, move: Move) -> bool:
        """Carry an action out; False where the page has no such button."""
        if move.verb == "search" and self._page is not Page.BOUGHT:
            self._open_results(self._shop.search(move.argument), 1)
            return True
        match self._page:
            case Page.RESULTS:
                return self._click_result(move.argument)
            case Page.ITEM:
                return self._click_item(move.argument)
            case Page.SUB_PAGE:
                return self._click_sub_page(move.argument)
            case Page.START | Page.BOUGHT:
                return False

    def _click_result(self, button: str) -> bool:
        if button == pages.BACK.lower():
            self._begin()
        elif button == pages.NEXT.lower() and pages.has_next(self._number, len(self._results)):
            self._number += 1
        elif button == pages.PREVIOUS.lower() and self._number > 1:
            self._number -= 1
        else:
            found = [product for product in self._shown() if product.asin.lower() == button]
            if not found:
                return False
            self._product = found[0]
            if self._product.asin not in self._looked_at:
                self._looked_at = (*self._looked_at, self._product.asin)
            self._page = Page.ITEM
        return True

    def _click_item(self, button: str) -> bool:
        if button == pages.BUY.lower():
            self._buy()
        elif button == pages.BACK.lower():
            self._begin()
        elif button == pages.PREVIOUS.lower():
            self._open_results(self._results, self._number)
        elif button in _SUB_PAGES:
            self._page, self._sub_page = Page.SUB_PAGE, _SUB_PAGES[button]
        else:
            return self._choose(button)
        return True

    def _click_sub_page(self, button: str) -> bool:
        if button == pages.BACK.lower():
            self._begin()
        elif button == pages.PREVIOUS.lower():
            self._page = Page.ITEM
        else:
            return False
        return True

    def _choose(self, value: str) -> bool:
        """Choose an option by its value; where two options have the same value, the later one, as in WebShop."""
        names = [name for name, values in self._bought().options.items() if value in values]
        if names:
            self._chosen = {**self._chosen, names[-1]: value}
        return bool(names)

    def _begin(self) -> None:
        self._page, self._looked_at = Page.START, ()
        self._product, self._chosen = None, {}

    def _open_results(self, found: tuple[int, ...], number: int) -> None:
        self._page, self._results, self._number = Page.RESULTS, found, number
        self._product, self._chosen = None, {}

    def _buy(self) -> None:
        product = self._bought()
        price = self._prices[self._shop.places[product.asin]]
        self._reward, parts = reward.grade(product, price, self._chosen, self._goal)
        self._details = {"bought": product.asin, "chosen": self._chosen, **parts}
        self._page = Page.BOUGHT

    def _bought(self) -> Product:
        if self._product is None:
            raise RuntimeError("a product's page without a product")
        return self._product

    def _shown(self) -> list[Product]:
        """The products of the current page of results."""
        first = (self._number - 1) * pages.PER_PAGE
        return [self._shop.products[place] for place in self._results[first : first + pages.PER_PAGE]]

    def _pieces(self) -> list[Piece]:
        goal = self._goal.text
        match self._page:
            case Page.START:
                return pages.start(goal)
            case Page.RESULTS:
                return pages.results(goal, self._shown(), self._number, len(self._results), self._looked_at)
            case Page.ITEM:
                return pages.item(goal, self._bought(), self._chosen)
            case Page.SUB_PAGE:
                return pages.sub_page(goal, self._bought(), self._sub_page)
            case Page.BOUGHT:
                return pages.bought(self._bought(), self._chosen, self._reward)
