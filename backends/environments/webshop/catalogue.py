"""The products of a shop, read from WebShop's own files.

Owns nothing that changes. A folder holds the products in `items_shuffle.json` (or `items_shuffle_1000.json`, the set
of 1,000); their attributes and synthetic instructions in `items_ins_v2.json` (or `items_ins_v2_1000.json`); and, where
people's instructions are wanted, those in `items_human_ins.json`. Products keep the order of the file: rankings,
prices and goals follow from it. What WebShop's pages do not show (images, ratings, sellers) is not kept.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson

from backends.server.environment import unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PRODUCTS: Final = ("items_shuffle.json", "items_shuffle_1000.json")
INSTRUCTIONS: Final = ("items_ins_v2.json", "items_ins_v2_1000.json")
HUMAN: Final = "items_human_ins.json"
SHIPPED: Final = Path(__file__).parent / "shipped"
"""A small catalogue made for this project, in the same form."""
DEFAULT_PRICE: Final = 100.0

_NO_ATTRIBUTES: Final = ("DUMMY_ATTR",)
"""WebShop's stand-in for a product without attributes; goals never name it."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """What a buyer asks for, in words, and what of it is graded. `options` are values."""

    text: str
    attributes: tuple[str, ...]
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Product:
    """One product. `prices` has none, one, or the two ends of a range, in dollars."""

    asin: str
    title: str
    description: str
    bullets: tuple[str, ...]
    options: Mapping[str, tuple[str, ...]]
    price_tag: str
    prices: tuple[float, ...]
    category: str
    query: str
    product_category: str
    attributes: tuple[str, ...]
    synthetic: Instruction | None
    human: tuple[Instruction, ...]

    @property
    def indexed(self) -> str:
        """The text that search looks into."""
        options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in self.options.items())
        first = self.bullets[0] if self.bullets else ""
        return " ".join((self.title, self.description, first, options)).lower()


def folder() -> Path:
    """Where the catalogue lies: the registered data, else what is shipped."""
    given = os.environ.get("ROLLOUT_DATA")
    return Path(given) if given else SHIPPED


def load(source: Path) -> list[Product]:
    """All products of a folder. Raises EnvironmentFault (unavailable) that names the file and what to do."""
    attributes = _parsed(_present(source, INSTRUCTIONS), dict)
    humans = _parsed(source / HUMAN, dict) if (source / HUMAN).exists() else {}
    path = _present(source, PRODUCTS)
    seen: set[str] = set()
    products: list[Product] = []
    for number, entry in enumerate(_parsed(path, list)):
        try:
            asin = entry["asin"]
            if asin != "nan" and len(asin) <= 10 and asin not in seen:
                seen.add(asin)
                products.append(_product(entry, attributes.get(asin, {}), humans.get(asin, ())))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _unusable(f"{path.name}, entry {number}: {type(error).__name__}: {error}") from None
    if not products:
        raise _unusable(f"{path.name} holds no product")
    return products


def _present(source: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (source / name).exists():
            return source / name
    raise _unusable(f"{source} holds no {' or '.join(names)}")


def _parsed(path: Path, kind: type) -> Any:
    try:
        value = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise _unusable(f"{path.name} cannot be read: {error}") from None
    if not isinstance(value, kind):
        raise _unusable(f"{path.name} is not a JSON {'list' if kind is list else 'object'}")
    return value


def _unusable(why: str) -> Exception:
    return unavailable("webshop", f"WebShop's data files ({why}); run `rollout env data webshop --from DIR` again")


def _product(entry: Mapping[str, Any], known: Mapping[str, Any], human: Any) -> Product:
    bullets = entry["small_description"]
    tag, prices = _pricing(entry.get("pricing"))
    return Product(
        asin=entry["asin"],
        title=entry["name"],
        description=entry["full_description"],
        bullets=tuple(bullets) if isinstance(bullets, list) else (bullets,),
        options={name.lower(): values for name, values in _options(entry["customization_options"])},
        price_tag=tag,
        prices=prices,
        category=entry["category"],
        query=entry["query"].lower().strip(),
        product_category=entry["product_category"],
        attributes=tuple(known.get("attributes", _NO_ATTRIBUTES)),
        synthetic=_synthetic(known),
        human=tuple(_human(given) for given in human if given["instruction_attributes"]),
    )


def _pricing(text: str | None) -> tuple[str, tuple[float, ...]]:
    """The price as shown, and as numbers: `$5.99$9.99` is a range."""
    if not text:
        return f"${DEFAULT_PRICE}", (DEFAULT_PRICE,)
    prices = tuple(float(re.sub(r"[^\d.]", "", part)) for part in text.split("$")[1:])[:2]
    return " to ".join(f"${price}" for price in prices), prices


def _options(given: Mapping[str, Any] | str) -> Iterator[tuple[str, tuple[str, ...]]]:
    if isinstance(given, str):
        return
    for name, choices in given.items():
        if choices is not None:
            yield name, tuple(choice["value"].strip().replace("/", " | ").lower() for choice in choices)


def _synthetic(known: Mapping[str, Any]) -> Instruction | None:
    text = known.get("instruction")
    return None if text is None else Instruction(text, tuple(known["instruction_attributes"]))


def _human(given: Mapping[str, Any]) -> Instruction:
    options = given["instruction_options"]
    values = options.values() if isinstance(options, dict) else options
    return Instruction(given["instruction"].strip("."), tuple(given["instruction_attributes"]), tuple(values))
