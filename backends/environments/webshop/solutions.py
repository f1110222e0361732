"""Known answers as actions: find the goal's product, open it, choose the options, buy.

The search is for the product's own title, and for its whole text where others with like titles push it off the list.
Where two of a product's options share a value, only the later can be chosen: WebShop's pages allow no more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from backends.environments.webshop import actions, pages
from backends.environments.webshop.reward import similar
from backends.server.environment import unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from backends.environments.webshop.catalogue import Product
    from backends.environments.webshop.goals import Goal
    from backends.environments.webshop.shop import Shop


def moves(shop: Shop, goal: Goal) -> list[bytes]:
    """The actions that buy what a goal asks for. Raises EnvironmentFault where no search finds its product."""
    product = goal.product
    words, rank = _query(shop, product)
    turns = [actions.message("click", pages.NEXT)] * (rank // pages.PER_PAGE)
    chosen = [actions.message("click", value) for value in _values(goal)]
    return [
        actions.message("search", words),
        *turns,
        actions.message("click", product.asin),
        *chosen,
        actions.message("click", pages.BUY),
    ]


def _query(shop: Shop, product: Product) -> tuple[str, int]:
    """What to search for, and the product's rank, from 0."""
    place = shop.places[product.asin]
    for text in (product.title, product.indexed):
        words = " ".join(text.split())[: actions.MAX_ARGUMENT]
        found = shop.search(words.lower())
        if place in found:
            return words, found.index(place)
    raise unavailable(f"the solution of {product.asin}", "a search that finds this product, and none does")


def _values(goal: Goal) -> Iterator[str]:
    """The option values to click: a synthetic goal names them; a person's words pick the most alike."""
    left = dict(goal.product.options)
    for name, value in goal.options:
        if name:
            yield value
            continue
        wanted = value.lower()
        fitting = [
            (candidate != wanted, option, candidate)
            for option, values in left.items()
            for candidate in values
            if candidate == wanted or similar(candidate, wanted)
        ]
        if fitting:
            _, option, candidate = min(fitting, key=lambda entry: entry[0])
            del left[option]
            yield candidate
