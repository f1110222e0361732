"""Goals and prices: WebShop's numbering to the byte, whatever the price seed."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest

from backends.environments.webshop import splits
from backends.environments.webshop.catalogue import load
from backends.environments.webshop.goals import NO_LIMIT, SHUFFLE_SEED, Goals
from backends.environments.webshop.reward import grade
from backends.server.environment import EnvironmentFault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from backends.environments.webshop.goals import Goal
    from backends.environments.webshop.shop import Shop

PLAYED = 2000


def digest(lines: Iterable[str]) -> str:
    return sha256("\n".join(lines).encode()).hexdigest()[:16]


def first(shop: Shop, price_seed: int) -> list[Goal]:
    goals = shop.goals("synthetic")
    return [goals.goal(number, price_seed) for number in range(PLAYED)]


def test_numbers_and_texts_are_upstreams(real_shop: Shop) -> None:
    assert len(real_shop.goals("synthetic")) == 6910
    goals = first(real_shop, SHUFFLE_SEED)
    wanted = (f"{goal.product.asin}|{json.dumps(dict(goal.options), sort_keys=True)}" for goal in goals)
    assert digest(wanted) == "9f704e04fe9c5c4a"
    assert digest(goal.text for goal in goals) == "1cc2cb9fd05123c0"


@pytest.mark.parametrize("price_seed", [SHUFFLE_SEED, 0, 2**63])
def test_buying_what_was_asked_for_is_worth_what_upstream_gives(real_shop: Shop, price_seed: int) -> None:
    prices = real_shop.goals("synthetic").prices(price_seed).products
    short = []
    for goal in first(real_shop, price_seed):
        price = prices[real_shop.places[goal.product.asin]]
        reward, parts = grade(goal.product, price, dict(goal.options), goal)
        if reward != 1.0:
            short.append(parts)
    assert PLAYED - len(short) == 1861
    for parts in short:
        assert (parts["r_type"], parts["price"]) == (1.0, True)
        assert parts["attributes"][0] == parts["attributes"][1]
        assert parts["options"][0] < parts["options"][1]


def test_a_price_seed_moves_prices_and_limits_but_no_goal(shop: Shop) -> None:
    goals = shop.goals("synthetic")
    one, other, again = (goals.prices(seed) for seed in (1, 2, 1))
    assert one == again
    assert one.products != other.products
    assert one.limits != other.limits
    for number in range(len(goals)):
        left, right = goals.goal(number, 1), goals.goal(number, 2)
        assert (left.product, left.options, left.attributes) == (right.product, right.options, right.attributes)
    for place, product in enumerate(shop.products):
        assert min(product.prices) <= one.products[place] <= max(product.prices)


def test_every_combination_of_options_is_a_goal(catalogue: Callable[..., Path]) -> None:
    options = {"Size": [{"value": "S"}, {"value": "M"}], "Color": [{"value": " Red/Blue "}], "Gone": None}
    asked = {"attributes": ["soft"], "instruction": "Find me a thing", "instruction_attributes": ["soft"]}
    source = catalogue({"customization_options": options}, {"asin": "P1"}, instructions={"P0": asked, "P1": asked})
    goals = Goals(load(source), human=False)
    texts = sorted(goals.goal(number, 0).text.partition(", and price")[0] for number in range(len(goals)))
    assert texts == [
        "Find me a thing",
        "Find me a thing with color: red | blue, and size: m",
        "Find me a thing with color: red | blue, and size: s",
    ]


@pytest.mark.parametrize(
    ("pricing", "limits"), [("$970.0", {990.0}), ("$980.0", {NO_LIMIT}), ("", {120.0, 130.0, 140.0})]
)
def test_limits_lie_above_the_price(catalogue: Callable[..., Path], pricing: str, limits: set[float]) -> None:
    asked = {"attributes": ["soft"], "instruction": "Find me a thing", "instruction_attributes": ["soft"]}
    goals = Goals(load(catalogue({"pricing": pricing}, instructions={"P0": asked})), human=False)
    drawn = {goals.goal(0, seed).price_limit for seed in range(60)}
    assert drawn == limits
    text = goals.goal(0, 0).text
    assert ("price lower than" in text) == (limits != {NO_LIMIT})


def test_peoples_instructions(catalogue: Callable[..., Path]) -> None:
    said = {"instruction": "i want a red thing.", "instruction_attributes": ["soft"], "instruction_options": ["red"]}
    unusable = {"instruction": "anything", "instruction_attributes": [], "instruction_options": []}
    goals = Goals(load(catalogue({}, human={"P0": [said, unusable, said]})), human=True)
    assert len(goals) == 2
    goal = goals.goal(0, SHUFFLE_SEED)
    assert goal.text.startswith("i want a red thing, and price lower than ")
    assert goal.options == (("", "red"),)


def test_missing_kinds_are_said_to_be_missing(catalogue: Callable[..., Path], real_shop: Shop) -> None:
    with pytest.raises(EnvironmentFault, match=r"items_human_ins\.json"):
        real_shop.goals("human")
    with pytest.raises(EnvironmentFault, match=r"unknown split 'trian'; did you mean 'train'\?"):
        splits.resolve(real_shop, "trian")


@pytest.mark.parametrize("kind", ["synthetic", "human"])
def test_sides_share_a_split_out(shop: Shop, kind: str) -> None:
    whole, *sides = (splits.resolve(shop, name).ids for name in (kind, f"{kind}:test", f"{kind}:dev", f"{kind}:train"))
    assert [task for side in sides for task in side] == list(whole)
    assert list(splits.resolve(shop, f"{kind}:val").ids) == [*sides[0], *sides[1]]
    assert all(sides)


def test_sides_of_the_real_goals_are_upstreams(real_shop: Shop) -> None:
    sizes = {side: len(splits.resolve(real_shop, side).ids) for side in splits.SIDES}
    assert sizes == {"train": 5410, "val": 1500, "test": 500, "dev": 1000}
    assert splits.resolve(real_shop, "train").ids[0] == "synthetic_1500"
    assert splits.resolve(real_shop, "").ids[0] == "synthetic_0"
    assert splits.resolve(real_shop, "webshop:val") == splits.resolve(real_shop, "synthetic:val")


@pytest.mark.parametrize("split", ["synthetic:", "train:train", "human:all", "all"])
def test_unknown_splits_are_refused(shop: Shop, split: str) -> None:
    with pytest.raises(EnvironmentFault, match="unknown split"):
        splits.resolve(shop, split)
