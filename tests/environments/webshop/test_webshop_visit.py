"""Visits: pages to the letter, what can be clicked and what cannot, and every move a buyer can think of."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from backends.environments.webshop.catalogue import SHIPPED
from backends.environments.webshop.inside import WebShop, environment
from backends.environments.webshop.session import Page
from backends.environments.webshop.shop import Shop
from backends.server.environment import EnvironmentFault

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from backends.environments.webshop.session import Visit
    from backends.server.environment import Reply

ASKED = "Find me soft things with color: red, and price lower than 20.00 dollars"
PRODUCT = {
    "asin": "PROD000001",
    "name": "Soft Thing",
    "full_description": "It is soft.",
    "small_description": ["Softer than most", " Red or blue "],
    "pricing": "$5.0$7.5",
    "customization_options": {"Color": [{"value": "Red"}, {"value": "blue"}], "Size": [{"value": "2/3"}]},
}


def say(content: object) -> bytes:
    return orjson.dumps({"role": "assistant", "content": content})


def call(*calls: tuple[str, Any]) -> bytes:
    entries = [
        {"id": f"c{number}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for number, (name, arguments) in enumerate(calls)
    ]
    return orjson.dumps({"role": "assistant", "content": None, "tool_calls": entries})


def contents(reply: Reply) -> list[str]:
    return [message["content"] for message in orjson.loads(reply.body)["messages"]]


def page(reply: Reply) -> str:
    return contents(reply)[-1]


@pytest.fixture
def small(catalogue: Callable[..., Path]) -> WebShop:
    """A shop of a dozen things, of which one is wanted."""
    asked = {"attributes": ["soft"], "instruction": "Find me soft things", "instruction_attributes": ["soft"]}
    others = [{"asin": f"PROD0000{number}", "name": f"Soft Thing Number {number}"} for number in range(10, 21)]
    return WebShop(Shop(catalogue(PRODUCT, *others, instructions={"PROD000001": asked})))


def opened(shop: WebShop, **options: Any) -> tuple[Visit, Reply, str]:
    """A visit, its first reply, and the instruction."""
    visit, reply = shop.open("synthetic_0", 0, options)
    return visit, reply, page(reply).split(" [SEP] ")[2] if "[SEP]" in page(reply) else page(reply).splitlines()[2]


def walk(visit: Visit, *said: str) -> str:
    text = ""
    for words in said:
        text = page(visit.step(say(words)))
    return text


def test_pages_as_text(small: WebShop) -> None:
    visit, reply, asked = opened(small)
    assert asked.startswith("Find me soft things with color: ")
    assert [message["role"] for message in orjson.loads(reply.body)["messages"]] == ["system", "user"]
    assert page(reply) == f"WebShop [SEP] Instruction: [SEP] {asked} [SEP] Search"
    head = f"Instruction: [SEP] {asked} [SEP] Back to Search"
    found = walk(visit, "search[Soft Thing]")
    assert found.startswith(f"{head} [SEP] Page 1 (Total results: 12) [SEP] Next > [SEP] PROD0000")
    assert found.count("PROD") == 10
    assert walk(visit, "click[Next >]").startswith(
        f"{head} [SEP] Page 2 (Total results: 12) [SEP] < Prev [SEP] PROD0000"
    )
    walk(visit, "search[softer than most red blue]")
    assert walk(visit, "click[prod000001]") == (
        f"{head} [SEP] < Prev [SEP] color [SEP] red [SEP] blue [SEP] size [SEP] 2 | 3 [SEP] Soft Thing"
        " [SEP] Price: $5.0 to $7.5 [SEP] Rating: N.A. [SEP] Description [SEP] Features [SEP] Reviews [SEP] Buy Now"
    )
    assert walk(visit, "click[Description]") == f"{head} [SEP] < Prev [SEP] It is soft."
    assert walk(visit, "click[< prev]", "click[Features]").endswith("< Prev [SEP] Softer than most [SEP] Red or blue")
    assert walk(visit, "click[< prev]", "click[Reviews]").endswith("< Prev [SEP] No reviews found")
    assert walk(visit, "click[Back to Search]") == page(reply)


def test_pages_as_rich_text(small: WebShop) -> None:
    visit, _, asked = opened(small, observation="text_rich")
    head = f"Instruction:\n{asked}\n[button] Back to Search [button_]\n"
    found = walk(visit, "search[softer than most]")
    assert found == f"{head}Page 1 (Total results: 1)\n\n[button] PROD000001 [button_]\nSoft Thing\n$5.0 to $7.5\n"
    rest = (
        "Soft Thing\nPrice: $5.0 to $7.5\nRating: N.A.\n[button] Description [button_]\n[button] Features [button_]\n"
        "[button] Reviews [button_]\n[button] Buy Now [button_]\n"
    )
    assert walk(visit, "click[PROD000001]", "click[2 | 3]", "click[blue]") == (
        f"You have clicked 2 | 3.\nYou have clicked blue.\n{head}[button] < Prev [button_]\ncolor\n"
        "  [button] red [button_]\n  [clicked button] blue [clicked button_]\nsize\n"
        f"  [clicked button] 2 | 3 [clicked button_]\n{rest}"
    )
    again = walk(visit, "click[< Prev]")
    assert "[clicked button] PROD000001 [clicked button_]" in again
    assert "clicked button" not in walk(visit, "click[PROD000001]"), "a new look at the results forgets the options"


def test_buttons_are_listed_on_request(small: WebShop) -> None:
    visit, reply, _ = opened(small, actions=True)
    first = json.loads(page(reply).partition("Available Actions:\n")[2])
    assert first == {"has_search_bar": True, "clickables": []}
    listed = json.loads(walk(visit, "search[softer than most]", "click[PROD000001]").partition("Actions:\n")[2])
    assert listed["clickables"] == [
        "back to search", "< prev", "red", "blue", "2 | 3", "description", "features", "reviews", "buy now",
    ]  # fmt: skip


@pytest.mark.parametrize("side", ["red", "blue"])
def test_the_purchase_is_graded_and_ends_the_visit(small: WebShop, side: str) -> None:
    visit, _, asked = opened(small)
    assert visit.evaluate({"sparse": True}).reward == 0.0
    walk(visit, "search[softer than most]", "click[PROD000001]", f"click[{side}]", "click[2 | 3]")
    assert visit.evaluate({}).reward == 0.0
    reply = visit.step(say("click[Buy Now]"))
    expected = 1.0 if f"color: {side}" in asked else 0.75
    assert (reply.done, reply.reward, visit.evaluate({}).reward) == (True, expected, expected)
    assert page(reply) == (
        "Thank you for shopping with us! [SEP] Your code: [SEP] None [SEP] (Paste it in your MTurk interface.)"
        f' [SEP] Purchased [SEP] asin [SEP] PROD000001 [SEP] options [SEP] {{"color": "{side}", "size": "2 | 3"}}'
        " [SEP] attrs [SEP] None [SEP] category [SEP] None [SEP] query [SEP] None [SEP] product category [SEP] None"
        " [SEP] Target [SEP] asin [SEP] options [SEP] attrs [SEP] price upper [SEP] instuction text [SEP] category"
        " [SEP] product category [SEP] query [SEP] Goal [SEP] None [SEP] Reward"
        f" [SEP] Your score (min 0.0, max 1.0) [SEP] {expected} [SEP] Reward Details [SEP] None"
    )
    assert visit.evaluate({}).details["chosen"] == {"color": side, "size": "2 | 3"}
    after = visit.step(call(("search", {"keywords": "x"})))
    assert page(after).startswith("Error: the purchase is made")
    assert visit.step(say("search[thing]")).reward == expected


@pytest.mark.parametrize(
    "words",
    [
        "", "buy it", "click[]", "search[]", "click[nothing]", "click[search]", "click[next >]", "click[< prev]",
        "buy[x]", "click[red]", "click[buy now]", "click[PROD000010]", "<think>search[thing]</think>",
        "<think>search[thing]", "research[thing]", "search[thing",
    ],
)  # fmt: skip
def test_what_cannot_be_done_changes_nothing(small: WebShop, words: str) -> None:
    visit, _, _ = opened(small)
    before = walk(visit, "search[softer than most]")
    reply = visit.step(say(words))
    assert (page(reply), reply.reward, reply.done) == (before, 0.0, False)


@pytest.mark.parametrize(
    "words",
    [
        "search[softer than most]", "  search[softer than most]\n", "Thought: look.\nAction: search[Softer Than Most]",
        "I could click[x], but no: search[softer than most]", "<think>click[x]</think>search[softer than most]",
        "search[softer than most]\nThat should do.", "search[softer [than] most]",
        [{"type": "text", "text": "search[softer "}, {"type": "text", "text": "than most]"}],
    ],
)  # fmt: skip
def test_ways_to_say_it(small: WebShop, words: object) -> None:
    visit, _, _ = opened(small)
    assert "PROD000001 [SEP] Soft Thing" in page(visit.step(say(words)))


def test_tool_calls_do_what_text_does(small: WebShop) -> None:
    spoken, _, _ = opened(small)
    called, _, _ = opened(small)
    moves = [("search", "Soft Thing"), ("click", "Next >"), ("click", "< Prev"), ("search", "softer than most"),
             ("click", "PROD000001"), ("click", "red"), ("click", "Buy Now")]  # fmt: skip
    for verb, argument in moves:
        key = "keywords" if verb == "search" else "value"
        one, other = spoken.step(say(f"{verb}[{argument}]")), called.step(call((verb, {key: argument})))
        assert (page(one), one.reward, one.done) == (page(other), other.reward, other.done)
        assert orjson.loads(other.body)["messages"][0]["tool_call_id"] == "c0"


def test_calls_of_one_message_follow_each_other(small: WebShop) -> None:
    visit, _, _ = opened(small)
    moves = [("search", {"keywords": "softer than most"}), ("click", {"value": "prod000001"}), ("buy", {}),
             ("click", {"value": "buy now"}), ("click", {"value": "red"})]  # fmt: skip
    reply = visit.step(call(*moves))
    texts = contents(reply)
    assert reply.done
    assert [text.startswith("Error: ") for text in texts] == [False, False, True, False, True]


@pytest.mark.parametrize(
    ("calls", "problem"),
    [
        ([5], "a tool call must be"),
        ([{"id": "c", "function": {"name": "click", "arguments": "{"}}], 'JSON such as {"value": "text"}'),
        ([{"id": "c", "function": {"name": "search", "arguments": {"keywords": 5}}}], "JSON such as"),
        ([{"id": "c", "function": {"name": "search", "arguments": "[]"}}], "JSON such as"),
        ([{"id": "c", "function": {"name": ["x"], "arguments": "{}"}}], "unknown tool"),
        ([{"id": "c", "function": {"name": "click", "arguments": '{"value": "x"}'}}], "nothing to click called 'x'"),
        ([{"id": "c", "function": {"name": "click", "arguments": '{"value": "x"}'}}] * 17, "at most 16 calls"),
        ({"id": "c"}, "must be a list"),
    ],
)
def test_bad_calls_are_told_what_is_wrong(small: WebShop, calls: object, problem: str) -> None:
    visit, _, _ = opened(small)
    assert problem in page(visit.step(orjson.dumps({"role": "assistant", "tool_calls": calls})))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"mode": "text"}, "unknown option 'mode'; webshop takes: actions, observation, price_seed"),
        ({"observation": "html"}, "known: text, text_rich"),
        ({"actions": 1}, "must be true or false"),
        ({"price_seed": "7"}, "must be an integer"),
    ],
)
def test_bad_options_are_refused(webshop: WebShop, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(EnvironmentFault, match=problem):
        webshop.open("synthetic_0", 0, options)


@pytest.mark.parametrize(
    "task",
    [
        "",
        "synthetic",
        "synthetic_",
        "synthetic_-1",
        "synthetic_01",
        "robot_0",
        "human_9999",
        "human_" + "9" * 5000,
        "human_\u0662",
    ],
)
def test_unknown_tasks_are_refused(webshop: WebShop, task: str) -> None:
    with pytest.raises(EnvironmentFault, match="unknown task"):
        webshop.open(task, 0, {})


def test_a_bad_parameter_is_refused(webshop: WebShop) -> None:
    visit, _ = webshop.open("human_0", 0, {})
    with pytest.raises(EnvironmentFault, match="unknown parameter 'dense'"):
        visit.evaluate({"dense": True})


def play(shop: WebShop, task: str) -> tuple[float, int]:
    visit, _ = shop.open(task, 0, {})
    replies = [visit.step(action) for action in shop.solution(task)]
    assert [reply.done for reply in replies] == [False] * (len(replies) - 1) + [True]
    return replies[-1].reward, len(replies)


@pytest.mark.parametrize("kind", ["synthetic", "human"])
def test_shipped_solutions_are_worth_one(webshop: WebShop, kind: str) -> None:
    assert {play(webshop, task)[0] for task in webshop.tasks(kind).ids} == {1.0}


def test_real_solutions_are_worth_what_upstream_gives(real_shop: Shop) -> None:
    shop = WebShop(real_shop)
    played = [play(shop, task) for task in shop.tasks("").ids[:2000]]
    assert sum(reward == 1.0 for reward, _ in played) == 1861
    assert max(steps for _, steps in played) <= WebShop.max_turns


def test_a_solution_turns_pages_where_it_must(catalogue: Callable[..., Path]) -> None:
    """Thirty products of one title: the wanted one stands on the third page of its own search."""
    asked = {"attributes": ["soft"], "instruction": "Find me soft things", "instruction_attributes": ["soft"]}
    alike = [{"asin": f"PROD0000{number}", "name": "Soft Thing"} for number in range(10, 40)]
    shop = WebShop(Shop(catalogue(*alike, instructions={"PROD000034": asked})))
    assert [orjson.loads(action)["content"] for action in shop.solution("synthetic_0")] == [
        "search[Soft Thing]", "click[Next >]", "click[Next >]", "click[PROD000034]", "click[Buy Now]",
    ]  # fmt: skip
    assert play(shop, "synthetic_0") == (1.0, 5)


def test_registered_data_replaces_what_is_shipped(
    catalogue: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROLLOUT_DATA", str(catalogue({})))
    with pytest.raises(EnvironmentFault, match="instructions in the data"):
        environment().tasks("")
    monkeypatch.delenv("ROLLOUT_DATA")
    assert len(environment().tasks("").ids) > 100


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("items_shuffle.json", "{", "items_shuffle.json cannot be read"),
        ("items_shuffle.json", "{}", "is not a JSON list"),
        ("items_shuffle.json", "[]", "holds no product"),
        ("items_shuffle.json", '[{"asin": "P"}]', "entry 0: KeyError: 'small_description'"),
        ("items_shuffle.json", "[5]", "entry 0: TypeError"),
        ("items_ins_v2.json", "[]", "is not a JSON object"),
        ("items_ins_v2.json", None, "holds no items_ins_v2.json or items_ins_v2_1000.json"),
    ],
)
def test_unusable_data_is_named(catalogue: Callable[..., Path], name: str, text: str | None, problem: str) -> None:
    source = catalogue({})
    (source / name).unlink()
    if text is not None:
        (source / name).write_text(text, encoding="utf-8")
    with pytest.raises(EnvironmentFault) as raised:
        Shop(source)
    assert problem in str(raised.value)
    assert "rollout env data webshop" in str(raised.value)


SHOP = WebShop(Shop(SHIPPED))
WORDS = st.one_of(
    st.text(max_size=20), st.sampled_from(["running shoes", "tea", "usb c cable black", "the of", "\x00"])
)


class Buyer(RuleBasedStateMachine):
    """What is listed can be clicked and leads on; nothing else does anything; two equal visits stay equal."""

    @initialize(task=st.sampled_from(SHOP.tasks("").ids), mode=st.sampled_from(["text", "text_rich"]))
    def enter(self, task: str, mode: str) -> None:
        options = {"observation": mode, "actions": True}
        self.visit, reply = SHOP.open(task, 1, options)
        self.twin, _ = SHOP.open(task, 2, options)
        self.text = page(reply)
        self.done = False

    def listed(self) -> list[str]:
        found: list[str] = json.loads(self.text.rpartition("Available Actions:\n")[2])["clickables"]
        return found

    def act(self, action: bytes) -> Reply:
        reply, other = self.visit.step(action), self.twin.step(action)
        assert reply == other
        self.text, self.done = page(reply), reply.done
        return reply

    @precondition(lambda self: not self.done)
    @rule(words=WORDS)
    def search(self, words: str) -> None:
        self.act(call(("search", {"keywords": words or " "})))
        assert "Total results: " in self.text
        assert "back to search" in self.listed()

    @precondition(lambda self: not self.done and self.listed())
    @rule(data=st.data())
    def click(self, data: st.DataObject) -> None:
        button = data.draw(st.sampled_from(self.listed()))
        reply = self.act(say(f"click[{button}]"))
        assert reply.done == (button == "buy now")
        assert button == "buy now" or reply.reward == 0.0

    @precondition(lambda self: not self.done)
    @rule(button=st.text(min_size=1, max_size=10))
    def click_elsewhere(self, button: str) -> None:
        before = self.text
        if button.lower() not in self.listed():
            self.act(say(f"click[{button}]"))
            assert self.text == before

    @precondition(lambda self: self.done)
    @rule(words=st.sampled_from(["search[tea]", "click[buy now]", "click[back to search]"]))
    def knock_at_a_closed_door(self, words: str) -> None:
        before = self.text
        assert self.act(say(words)).done
        assert self.text == before

    @invariant()
    def the_grade_waits_for_the_purchase(self) -> None:
        if hasattr(self, "visit"):
            grade = self.visit.evaluate({})
            assert 0.0 <= grade.reward <= 1.0
            assert (grade.details["bought"] is not None) == self.done
            assert self.done == (self.visit._page is Page.BOUGHT)


Buyer.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestBuyer = Buyer.TestCase
