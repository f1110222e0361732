"""What a buyer sees: the pages of the shop as lists of pieces, and their two renderings.

`text`: the pieces' texts, joined by ` [SEP] `. `text_rich`: a piece a line, what can be pressed in `[button]` marks,
and what has been pressed already in `[clicked button]` marks. Both are WebShop's observation modes, word for word.
"""

from __future__ import annotations

import json
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from backends.environments.webshop.catalogue import Product

MODES: Final = ("text", "text_rich")
PER_PAGE: Final = 10
BACK: Final = "Back to Search"
PREVIOUS: Final = "< Prev"
NEXT: Final = "Next >"
BUY: Final = "Buy Now"
SUB_PAGES: Final = ("Description", "Features", "Reviews")
_RATING: Final = "N.A."
"""WebShop's data set comes without its reviews: every rating is shown so, and every page of reviews is empty."""
_THANKS: Final = (
    "Thank you for shopping with us!", "Your code:", "None", "(Paste it in your MTurk interface.)", "Purchased", "asin",
)  # fmt: skip
_EMPTY_FORM: Final = (
    "attrs", "None", "category", "None", "query", "None", "product category", "None", "Target", "asin", "options",
    "attrs", "price upper", "instuction text", "category", "product category", "query", "Goal", "None", "Reward",
    "Your score (min 0.0, max 1.0)",
)  # fmt: skip
"""Upstream's spelling."""
_END: Final = ("Reward Details", "None")
_ESCAPED: Final = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&'"}
"""What JSON inside HTML must not hold."""


class Kind(Enum):
    """What a piece of a page is."""

    PLAIN = 0
    BUTTON = 1
    OPTION = 2
    PRODUCT = 3


class Piece(NamedTuple):
    """A piece of a page. `pressed`: whether this option is chosen, or this product was looked at before."""

    text: str
    kind: Kind = Kind.PLAIN
    pressed: bool = False


def start(goal: str) -> list[Piece]:
    """The first page: the instruction and the search bar."""
    return [Piece("WebShop"), *_instruction(goal), Piece("Search", Kind.BUTTON)]


def results(goal: str, products: Sequence[Product], number: int, total: int, looked_at: Collection[str]) -> list[Piece]:
    """One page of results, `number` from 1; `products` are this page's, `looked_at` the asins opened before."""
    page = [*_instruction(goal), Piece(BACK, Kind.BUTTON), Piece(f"Page {number} (Total results: {total})")]
    if number > 1:
        page.append(Piece(PREVIOUS, Kind.BUTTON))
    if has_next(number, total):
        page.append(Piece(NEXT, Kind.BUTTON))
    for product in products:
        page += (
            Piece(product.asin, Kind.PRODUCT, product.asin in looked_at),
            Piece(product.title),
            Piece(product.price_tag),
        )
    return page


def has_next(number: int, total: int) -> bool:
    """Whether there are results behind page `number`."""
    return number * PER_PAGE < total


def item(goal: str, product: Product, chosen: Mapping[str, str]) -> list[Piece]:
    """A product's page with its options."""
    page = [*_instruction(goal), Piece(BACK, Kind.BUTTON), Piece(PREVIOUS, Kind.BUTTON)]
    picked = set(chosen.values())
    for name, values in product.options.items():
        page.append(Piece(name))
        page += (Piece(value, Kind.OPTION, value in picked) for value in values)
    page += (Piece(product.title), Piece(f"Price: {product.price_tag}"), Piece(f"Rating: {_RATING}"))
    page += (Piece(name, Kind.BUTTON) for name in (*SUB_PAGES, BUY))
    return page


def sub_page(goal: str, product: Product, name: str) -> list[Piece]:
    """One of a product's SUB_PAGES."""
    texts: Mapping[str, Sequence[str]] = {"Description": (product.description,), "Features": product.bullets}
    head = [*_instruction(goal), Piece(BACK, Kind.BUTTON), Piece(PREVIOUS, Kind.BUTTON)]
    return [*head, *(Piece(text) for text in texts.get(name, ("No reviews found",)))]


def bought(product: Product, chosen: Mapping[str, str], reward: float) -> list[Piece]:
    """The last page, a form for paid annotators; in upstream's simulation most of its fields stay empty."""
    options = json.dumps(chosen, sort_keys=True).translate(_ESCAPED)
    return [Piece(text) for text in (*_THANKS, product.asin, "options", options, *_EMPTY_FORM, str(reward), *_END)]


def render(page: Sequence[Piece], mode: str) -> str:
    """A page as an observation in one of MODES."""
    pieces = [piece._replace(text=text) for piece in page if (text := piece.text.strip())]
    if mode == "text":
        return " [SEP] ".join(piece.text for piece in pieces)
    notes = [f"You have clicked {piece.text}." for piece in pieces if piece.kind is Kind.OPTION and piece.pressed]
    return "\n".join((*reversed(notes), *map(_marked, pieces))) + "\n"


def pressable(page: Sequence[Piece]) -> Iterator[str]:
    """What can be clicked on a page, as a click's argument; Search is no click."""
    for piece in page:
        if piece.kind is not Kind.PLAIN and piece.text != "Search":
            yield piece.text.lower()


def _instruction(goal: str) -> tuple[Piece, Piece]:
    return Piece("Instruction:"), Piece(goal)


def _marked(piece: Piece) -> str:
    if piece.kind is Kind.PLAIN:
        return piece.text
    mark = "clicked button" if piece.pressed else "button"
    before = {Kind.BUTTON: "", Kind.OPTION: "  ", Kind.PRODUCT: "\n"}[piece.kind]
    return f"{before}[{mark}] {piece.text} [{mark}_]"
