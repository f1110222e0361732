"""GSM8K: every gold answer in every style, what must not count as one, the calculator, and whole runs by replay."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.environments.catalog import find, home
from backends.environments.data import register
from backends.environments.gsm8k.answers import STYLES, extract
from backends.environments.gsm8k.calculator import MAX_EXPRESSION, calculate
from backends.environments.gsm8k.inside import Gsm8k, environment, load
from backends.sandboxes.local import LocalBackend
from backends.server.environment import EnvironmentFault
from orchestrator import Orchestrator
from orchestrator.testing import check_environment
from policies.agents.replay import ReplayPolicy

REAL = Path(__file__).parents[4] / "shared" / "data" / "gsm8k"
PROBLEMS = 7473 + 1319


@pytest.fixture(scope="module")
def real() -> Path:
    if not (REAL / "train.jsonl").is_file():
        pytest.skip(f"the public data of GSM8K is not at {REAL}")
    return REAL


def say(content: object, **more: object) -> bytes:
    return orjson.dumps({"role": "assistant", "content": content, **more})


def test_every_gold_answer_in_every_style(real: Path) -> None:
    """The count is the data's; the graded text is its own solution, written as each style asks for."""
    env = Gsm8k({part: load(real / f"{part}.jsonl") for part in ("train", "test")})
    tasks = env.tasks("gsm8k").ids
    assert len(tasks) == PROBLEMS
    for style in STYLES:
        right = 0
        for task in tasks:
            session, _ = env.open(task, 0, {"style": style})
            (action,) = env.solution(task)
            right += session.step(action).reward == session.evaluate({}).reward == 1.0
        assert right == PROBLEMS, style


def test_a_neighbouring_number_never_counts(real: Path) -> None:
    for problem in load(real / "test.jsonl"):
        wrong = problem.gold + 1
        for text in (f"#### {wrong}", f"it is {wrong}", f"\\boxed{{{wrong}}}"):
            assert all(extract(text, style) != problem.gold for style in STYLES)


@pytest.mark.parametrize(
    ("style", "text", "found"),
    [
        ("strict", "so\n#### 18", 18),
        ("strict", "#### $1,234.50", Fraction("1234.5")),
        ("strict", "#### -5", -5),
        ("strict", "#### 1\nno:\n#### 2", 2),
        ("strict", "#### 18.", 18),
        ("strict", "####18", 18),
        ("strict", "the answer is 18", None),
        ("strict", "####", None),
        ("strict", "#### eighteen", None),
        ("flexible", "2 apples and 3 pears: 5.", 5),
        ("flexible", "it costs $1,000", 1000),
        ("flexible", "from 4 to 1,2", 2),
        ("flexible", "3-2", 2),
        ("flexible", "down to -5 degrees", -5),
        ("flexible", "half is .5", Fraction(1, 2)),
        ("flexible", "none", None),
        ("flexible", "9" * 65, None),
        ("boxed", r"\boxed{18}", 18),
        ("boxed", r"\boxed{1{,}234\text{ dollars}}", 1234),
        ("boxed", r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
        ("boxed", r"\boxed{-\dfrac{1}{2}}", Fraction(-1, 2)),
        ("boxed", r"\boxed{\$25\%}", None),
        ("boxed", r"\boxed{1} then \boxed{2}", 2),
        ("boxed", r"\boxed{\frac{1}{0}}", None),
        ("boxed", r"\boxed{18", None),
        ("boxed", "18", None),
    ],
)
def test_what_each_style_finds(style: str, text: str, found: int | None) -> None:
    assert extract(text, style) == found


@given(st.text(), st.sampled_from(STYLES))
def test_any_text_can_be_read(text: str, style: str) -> None:
    extract(text, style)
    extract(f"\\boxed{{{text}}} #### {text}", style)


@given(st.integers(-(10**12), 10**12), st.sampled_from(STYLES))
def test_a_number_is_found_however_it_is_grouped(value: int, style: str) -> None:
    for text in (f"{value}", f"{value:,}", f"{value}.00"):
        assert extract(f"words 7\n\\boxed{{{text}}}\n#### {text}", style) == value


def test_the_gold_number_inside_the_answer_is_not_enough() -> None:
    session, _ = environment().open("test_0", 0, {})
    assert session.step(say("10 10 10: but I say\n#### 11")).reward == 0.0


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("2+3*4", "14"),
        ("(1,250 + 50) / 4", "325"),
        ("10/3", "3.3333333333"),
        ("-1/8", "-0.125"),
        ("0.1+0.2", "0.3"),
        ("3 x 4", "12"),
        ("1/0", "error: division by zero"),
        ("9" * 41, "error: the result has more than 40 digits"),
        ("2**10", "error: only numbers, + - * / and brackets are understood"),
        ("__import__('os')", "error: only numbers, + - * / and brackets are understood"),
        ("True", "error: only numbers, + - * / and brackets are understood"),
        ("1e999", "error: only numbers, + - * / and brackets are understood"),
        ("", "error: only numbers, + - * / and brackets are understood"),
        ("(" * 200, "error: only numbers, + - * / and brackets are understood"),
        ("1" * (MAX_EXPRESSION + 1), "error: the expression has 257 characters, at most 256 are taken"),
    ],
)
def test_the_calculator(expression: str, result: str) -> None:
    assert calculate(expression) == result


@given(st.text(alphabet="0123456789+-*/(). x$,"))
def test_the_calculator_never_raises(expression: str) -> None:
    assert calculate(expression)


def test_calls_then_an_answer() -> None:
    session, opening = environment().open("test_0", 0, {"calculator": True})
    assert opening.toolset is not None
    call = {"id": "c1", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "1250*3"}'}}
    reply = session.step(say(None, tool_calls=[call, {"function": {"name": "rm"}}, 7]))
    first, second, third = orjson.loads(reply.body)["messages"]
    assert (first["tool_call_id"], first["content"]) == ("c1", "3750")
    assert second["content"] == third["content"] == "error: there is no such tool; the only one is calculator"
    assert not reply.done
    assert session.evaluate({}).reward == 0.0
    reply = session.step(say("#### 3,750"))
    assert (reply.done, reply.reward, session.evaluate({}).reward) == (True, 1.0, 1.0)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "your message is empty"),
        ("  ", "your message is empty"),
        (8, "content must be a string"),
        ([{"type": "image_url"}], "content must be a string"),
        ([{"type": "text", "text": "It is"}, {"type": "text", "text": " so"}], None),
    ],
)
def test_an_answer_is_text_or_parts_of_text(content: object, told: str | None) -> None:
    session, _ = environment().open("test_0", 0, {})
    reply = session.step(say(content))
    assert reply.done == (told is None)
    assert told is None or told in reply.body.decode()


def test_the_grade_does_not_tell_the_answer() -> None:
    session, _ = environment().open("test_0", 0, {})
    assert "3750" not in str(session.evaluate({}))


@pytest.mark.parametrize("options", [{"style": "loose"}, {"calculator": "yes"}, {"styles": "strict"}])
def test_options_that_do_not_exist_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(EnvironmentFault):
        environment().open("test_0", 0, options)


@pytest.mark.parametrize("line", ["", "[]", '{"question": "?", "answer": "eight"}', '{"answer": "#### 8"}'])
def test_data_that_is_none_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "?", "answer": "#### 8"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(EnvironmentFault, match=r"train\.jsonl, line 2"):
        load(path)


@pytest.mark.parametrize("split", ["", "gsm8k", "gsm8k:train", "gsm8k:val"])
async def test_gsm8k_keeps_its_contract(split: str) -> None:
    await check_environment(lambda: LocalBackend("gsm8k"), split, tasks=3)


@pytest.fixture
def at_home(real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLOUT_HOME", str(tmp_path / "home"))
    register(find("gsm8k"), real, home() / "data", lambda line: None)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.usefixtures("at_home")
async def test_the_registered_data_is_played(style: str, tmp_path: Path) -> None:
    async with Orchestrator(
        backend=LocalBackend("gsm8k"), policy=ReplayPolicy(), out=tmp_path / "run", options={"style": style}
    ) as orch:
        summary = await orch.run(split="gsm8k:test")
    assert (summary.episodes, summary.reward_one, summary.failures) == (1319, 1319, {})
