"""The shop that ships with the project, and the real one of 1,000 products where its files lie beside the checkout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from backends.environments.webshop.catalogue import SHIPPED
from backends.environments.webshop.inside import WebShop
from backends.environments.webshop.shop import Shop

if TYPE_CHECKING:
    from collections.abc import Callable

REAL = Path(__file__).parents[4] / "shared" / "data" / "webshop"


@pytest.fixture(scope="session")
def shop() -> Shop:
    """The shipped catalogue."""
    return Shop(SHIPPED)


@pytest.fixture(scope="session")
def webshop(shop: Shop) -> WebShop:
    """The environment on the shipped catalogue."""
    return WebShop(shop)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of the real files; the tests that need them are skipped, visibly, where they are not."""
    if not (REAL / "items_shuffle_1000.json").exists():
        pytest.skip(f"WebShop's 1,000 products are not in {REAL}")
    return REAL


@pytest.fixture(scope="session")
def real_shop(data: Path) -> Shop:
    """The 1,000 products."""
    return Shop(data)


@pytest.fixture
def catalogue(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder of data: products as dicts that may leave out what has a default, instructions by asin."""

    def write(*products: dict[str, Any], instructions: Any = None, human: Any = None) -> Path:
        complete = [_complete(number, product) for number, product in enumerate(products)]
        (tmp_path / "items_shuffle.json").write_text(json.dumps(complete), encoding="utf-8")
        (tmp_path / "items_ins_v2.json").write_text(json.dumps(instructions or {}), encoding="utf-8")
        if human is not None:
            (tmp_path / "items_human_ins.json").write_text(json.dumps(human), encoding="utf-8")
        return tmp_path

    return write


def _complete(number: int, product: dict[str, Any]) -> dict[str, Any]:
    return {
        "asin": f"P{number}",
        "name": "A thing",
        "full_description": "",
        "small_description": [],
        "pricing": "$5.0",
        "product_category": "Home \u203a Things",
        "category": "garden",
        "query": "things",
        "customization_options": "",
    } | product
