"""Goals, and the prices they depend on.

A goal asks for one product with certain attributes and options below a price. Its number decides product and
options, and never changes: goals are listed product by product (a synthetic instruction once for every combination of
the product's options, a person's instruction as it is) and shuffled with WebShop's fixed seed. Where a product's price
is a range, and how far above it a goal's limit lies, is drawn from a price seed, in WebShop's order of draws: one
`Prices` for each seed.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Final, NamedTuple

from backends.environments.webshop.catalogue import DEFAULT_PRICE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from backends.environments.webshop.catalogue import Instruction, Product

SHUFFLE_SEED: Final = 233
"""WebShop's; the default price seed too."""
NO_LIMIT: Final = 1_000_000.0
_LIMITS: Final = tuple(10.0 * step for step in range(1, 100))
_CHOICES: Final = 4
_PRICE_SEEDS_KEPT: Final = 4


@dataclass(frozen=True, slots=True)
class Goal:
    """What one episode's buyer wants. `options` maps names to values; a person names values only: then keys are ""."""

    product: Product
    text: str
    attributes: tuple[str, ...]
    options: tuple[tuple[str, str], ...]
    price_limit: float


class Prices(NamedTuple):
    """All that one price seed decides: dollars by product, limits by place in the goals' list."""

    products: Sequence[float]
    limits: Sequence[float]


class Goals:
    """The goals of one kind: `synthetic` or people's."""

    def __init__(self, products: Sequence[Product], *, human: bool) -> None:
        self._products = products
        self._human = human
        self._askers = [(place, asked) for place, product in enumerate(products) for asked in _asked(product, human)]
        combinations = [1 if human else _combinations(products[place]) for place, _ in self._askers]
        self._ends = array("q", accumulate(combinations))
        self._order = array("q", range(self._ends[-1] if self._ends else 0))
        random.Random(SHUFFLE_SEED).shuffle(self._order)
        self.prices = lru_cache(maxsize=_PRICE_SEEDS_KEPT)(self._prices)
        """`prices(seed)`: what this seed decides. The latest few are kept."""

    def __len__(self) -> int:
        return len(self._order)

    def goal(self, number: int, price_seed: int) -> Goal:
        """A goal by its number, from 0."""
        flat = self._order[number]
        asker = bisect_right(self._ends, flat)
        place, asked = self._askers[asker]
        product = self._products[place]
        start = self._ends[asker - 1] if asker else 0
        options = tuple(("", value) for value in asked.options) if self._human else _nth(product.options, flat - start)
        limit = self.prices(price_seed).limits[asker]
        return Goal(product, _worded(asked, options, limit, self._human), asked.attributes, options, limit)

    def _prices(self, seed: int) -> Prices:
        random_numbers = random.Random(seed)
        prices = array("d", (_drawn(product.prices, random_numbers) for product in self._products))
        return Prices(prices, array("d", (_limit(prices[place], random_numbers) for place, _ in self._askers)))


def _asked(product: Product, human: bool) -> Sequence[Instruction]:
    if human:
        return product.human
    return () if product.synthetic is None else (product.synthetic,)


def _combinations(product: Product) -> int:
    return prod(len(values) for values in product.options.values())


def _nth(options: Mapping[str, tuple[str, ...]], number: int) -> tuple[tuple[str, str], ...]:
    """The n-th combination of options, names sorted, the last name's values changing fastest."""
    chosen: list[tuple[str, str]] = []
    for name in sorted(options, reverse=True):
        number, place = divmod(number, len(options[name]))
        chosen.append((name, options[name][place]))
    return tuple(reversed(chosen))


def _worded(asked: Instruction, options: Sequence[tuple[str, str]], limit: float, human: bool) -> str:
    listed = "" if human else ", and ".join(f"{name}: {value}" for name, value in options)
    below = "" if limit == NO_LIMIT else f", and price lower than {limit:.2f} dollars"
    return f"{asked.text}{' with ' if listed else ''}{listed}{below}"


def _drawn(prices: Sequence[float], random_numbers: random.Random) -> float:
    if not prices:
        return DEFAULT_PRICE
    return prices[0] if len(prices) == 1 else random_numbers.uniform(prices[0], prices[1])


def _limit(price: float, random_numbers: random.Random) -> float:
    above = [limit for limit in _LIMITS if limit > price][:_CHOICES]
    return max(random_numbers.sample(above, 2)) if len(above) > 1 else NO_LIMIT
