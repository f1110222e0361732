"""What a purchase is worth: WebShop's reward.

    reward = type * (attributes + options + price) / (wanted attributes + wanted options + 1)

`attributes` and `options` count what of the goal the purchase has, `price` is 1 within the limit, `type` is 1.0, 0.5,
0.1 or 0.0 by how near the product's kind is to the goal's. Pure; every part is reported.

Upstream compares a chosen value with the text of a pair, `('color', 'red')`, when the goal is synthetic, and only the
chosen value has its colour normalised. That makes some options impossible to match, and it is kept: rewards are
comparable with published ones.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from rapidfuzz.fuzz import token_set_ratio

from backends.environments.webshop.nouns import METHOD, nouns
from backends.environments.webshop.words import COLOURS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from backends.environments.webshop.catalogue import Product
    from backends.environments.webshop.goals import Goal

SIMILAR: Final = 85
"""Two texts match when their token set ratio, in whole per cent, is above this."""

_LATIN_1 = dict.fromkeys(range(128, 256))
_NO_WORD = re.compile(r"\W")


def grade(product: Product, price: float, options: Mapping[str, str], goal: Goal) -> tuple[float, dict[str, Any]]:
    """The reward of a purchase, from 0.0 to 1.0, and its parts."""
    kind, details = _kind(product, goal.product)
    attributes = sum(_has(product, wanted) for wanted in goal.attributes)
    chosen = [normal_colour(value) for value in options.values()]
    wanted = [str(pair) if pair[0] else normal_colour(pair[1]) for pair in goal.options]
    matched = sum(any(similar(value, option) for value in chosen) for option in wanted)
    affordable = price <= goal.price_limit
    reward = kind * (attributes + matched + affordable) / (len(goal.attributes) + len(wanted) + 1)
    details |= {
        "r_type": kind,
        "attributes": [attributes, len(goal.attributes)],
        "options": [matched, len(wanted)],
        "price": affordable,
    }
    return reward, details


def similar(one: str, other: str) -> bool:
    """Whether two texts hold nearly the same words."""
    first, second = _processed(one), _processed(other)
    return bool(first and second) and round(token_set_ratio(first, second)) > SIMILAR


def normal_colour(value: str) -> str:
    """The first colour word in a value, or the value."""
    return next((colour for colour in COLOURS if colour in value), value)


def _processed(text: str) -> str:
    """Words only, lower case, letters of Latin-1 beyond ASCII dropped, as upstream's matcher prepares its texts."""
    return _NO_WORD.sub(" ", text.translate(_LATIN_1)).lower().strip()


def _has(product: Product, attribute: str) -> bool:
    """Whether a product has an attribute: listed, or named in its texts."""
    return (
        any(similar(listed, attribute) for listed in product.attributes)
        or attribute in product.title.lower()
        or attribute in " ".join(product.bullets).lower()
        or attribute in product.description.lower()
    )


def _kind(product: Product, wanted: Product) -> tuple[float, dict[str, Any]]:
    same_query = product.query == wanted.query
    same_category = len(_categories(product) & _categories(wanted)) >= 2
    score = title_score(product.title, wanted.title)
    kind = 1.0 if same_query or same_category or score > 0.2 else 0.5
    if score < 0.1:
        kind = 0.1 if score else 0.0
    return kind, {"query_match": same_query, "category_match": same_category, "title_score": score, "nouns": METHOD}


def title_score(title: str, wanted: str) -> float:
    """The share of the wanted title's nouns that the other has; 0.2 where it has none to compare."""
    asked: Sequence[str] = nouns(wanted)
    return len(set(nouns(title)) & set(asked)) / len(asked) if asked else 0.2


def _categories(product: Product) -> set[str]:
    return {part.strip() for part in product.product_category.split("\u203a")}
