"""Worlds on their own interpreter, played and graded in forked children, without a server: what agents see and earn."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import appworld_tasks
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FIRST = "tidy01_1"
COMPLETE = "```python\napis.supervisor.complete_task()\n```"


class Player:
    """A process that plays jobs; see `inside/play.py`."""

    def __init__(self, python: Path, data: Path, folder: Path) -> None:
        variables = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
            "ROLLOUT_DATA": str(data),
            "HOME": str(folder),
            "TMPDIR": str(folder),
        }
        self.process = subprocess.Popen(
            [str(python), str(HERE / "inside" / "play.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=variables,
        )

    def __call__(self, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
        """The outcomes of jobs, in order."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        outcomes = []
        for job in jobs:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            outcomes.append(json.loads(self.process.stdout.readline()))
        return outcomes

    def end(self) -> None:
        self.process.communicate(timeout=30)
        assert self.process.returncode == 0


@pytest.fixture(scope="module")
def play(python: Path, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Player]:
    player = Player(python, made, tmp_path_factory.mktemp("play"))
    yield player
    player.end()


@pytest.fixture
def another(python: Path, made: Path, tmp_path: Path) -> Iterator[Player]:
    """One more, in another folder."""
    player = Player(python, made, tmp_path)
    yield player
    player.end()


def block(code: str) -> str:
    return f"```python\n{code}\n```"


def said(outcome: dict[str, Any], turn: int = -1) -> str:
    [message] = outcome["bodies"][turn]["messages"]
    return str(message["content"])


def test_gold_is_worth_one_and_nothing_nothing(play: Player) -> None:
    tasks = appworld_tasks.tasks()
    gold = [{"task": task.id, "actions": [block(task.solution)]} for task in tasks]
    idle = [{"task": task.id, "actions": [COMPLETE] * (task.answer is not None)} for task in tasks]
    outcomes = play(*gold, *idle)
    solved, unsolved = outcomes[: len(tasks)], outcomes[len(tasks) :]
    assert [outcome["reward"] for outcome in solved] == [1.0] * len(tasks)
    assert [outcome["dones"] for outcome in solved] == [[True]] * len(tasks)
    assert [outcome["reward"] for outcome in unsolved] == [0.0] * len(tasks)


def test_rewards_are_dense_or_sparse(play: Player) -> None:
    half = appworld_tasks.tasks()[0].solution.replace("answer=len(left)", "answer=99")
    job = {"task": FIRST, "actions": [block(half)]}
    dense, sparse, by_default, overruled = play(
        job,
        job | {"params": {"sparse": True}},
        job | {"options": {"sparse": True}},
        job | {"options": {"sparse": True}, "params": {"sparse": False}},
    )
    assert dense["reward"] == pytest.approx(2 / 3)
    assert dense["details"] == {"success": False, "passed": 2, "tests": 3, "failures": ["the answer is right"]}
    assert [sparse["reward"], by_default["reward"]] == [0.0, 0.0]
    assert overruled["reward"] == dense["reward"]


def test_what_is_opened_and_said(play: Player) -> None:
    plain, simple, bare, tools = play(
        {"task": FIRST, "actions": [block("print('hello')"), block("x = 1"), "no code", block("1/0")]},
        {"task": FIRST, "options": {"simple": True}, "actions": ["print('hello')"]},
        {"task": FIRST, "options": {"prompt": False}},
        {"task": FIRST, "options": {"tools": True}, "actions": [_called("print(1)", "x = 2", "print(x)")]},
    )
    instruction = appworld_tasks.tasks()[0].instruction
    for outcome in (plain, simple, bare, tools):
        system, user = outcome["bodies"][0]["messages"]
        assert (system["role"], user) == ("system", {"role": "user", "content": instruction})
        assert "Ada Example; e-mail ada.example@example.com, phone number 5550100001" in system["content"]
    lengths = [len(outcome["bodies"][0]["messages"][0]["content"]) for outcome in (bare, simple, plain)]
    assert lengths == sorted(lengths)
    assert lengths[0] < 120
    assert said(plain, 1) == "Output:\n```\nhello\n```\n\n"
    assert said(plain, 2) == "Output:\n```\nExecution successful.\n```\n\n"
    assert "Write one block of Python" in said(plain, 3)
    assert "ZeroDivisionError: division by zero" in said(plain, 4)
    assert said(simple, 1) == "hello\n"
    assert "tools" not in plain["bodies"][0]
    assert tools["bodies"][0]["tools"]
    assert [(m["role"], m["tool_call_id"], m["content"]) for m in tools["bodies"][1]["messages"]] == [
        ("tool", "c0", "1\n"),
        ("tool", "c1", "Execution successful."),
        ("tool", "c2", "2\n"),
    ]


def _called(*codes: str) -> dict[str, Any]:
    calls = [
        {"id": f"c{n}", "type": "function", "function": {"name": "appworld", "arguments": json.dumps({"code": code})}}
        for n, code in enumerate(codes)
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def test_the_call_that_completes_the_task_ends_the_episode(play: Player) -> None:
    [outcome] = play({"task": FIRST, "actions": [_called("x = 1", "apis.supervisor.complete_task()", "print(x)")]})
    assert outcome["dones"] == [True]
    assert outcome["bodies"][1]["messages"][2]["content"] == "not run: the task has been called complete"


def test_code_that_breaks_things_gets_an_answer(play: Player) -> None:
    """Whatever it breaks, the episode goes on or ends, and is graded by what the databases held."""
    deleted = appworld_tasks.tasks()[0].solution.replace("apis.supervisor.complete_task", "str")
    breaking = {
        "raise KeyboardInterrupt": "KeyboardInterrupt",
        "raise SystemExit": "Exception",
        "raise BaseException('odd')": "odd",
        "while True: pass": "timed out after 2 seconds",
        "import subprocess": "not allowed",
        "print('x' * 150_000)": "50,001 characters more, left out",
        "print(apis.simple_note.search_notes)": "at 0x0>",
        "def f(": "Syntax error",
        "requester.request = None": "successful",
    }
    jobs = [{"task": FIRST, "options": {"action_s": 2}, "actions": [block(deleted), block(code)]} for code in breaking]
    for outcome, (code, told) in zip(play(*jobs), breaking.items(), strict=True):
        assert told in said(outcome), code
        assert outcome["reward"] == pytest.approx(2 / 3), code
        assert outcome["dones"] == [False, code.startswith("requester")], code


def test_equal_actions_give_equal_bytes(play: Player, another: Player) -> None:
    jobs = [{"task": task.id, "actions": [block(task.solution)]} for task in appworld_tasks.tasks()[::4]]
    curious = (
        "import os, pathlib\nprint(apis, apis.phone.login, object(), {'a', 'b', 'c'})\n"
        "print(DateTime.now(), random.random(), os.environ['APPWORLD_ROOT'], os.environ['TMPDIR'])"
    )
    lost = "print(pathlib.Path(os.environ['APPWORLD_ROOT'], 'nothing').read_text())"
    jobs.append({"task": FIRST, "actions": [block(curious), block("1/0"), block(lost), block(curious)], "seed": 2**62})
    first, second = play(*jobs), another(*reversed(jobs))
    for one, other in zip(first, reversed(second), strict=True):
        assert one["bodies"] == other["bodies"]
        assert one["state"] == other["state"]
    assert "2023-05-18" in said(first[-1])


def test_a_state_is_never_believed(play: Player) -> None:
    """States that no session of the task can have: worth nothing, and no statement of theirs is carried out."""
    [solved] = play({"task": FIRST, "actions": [block(appworld_tasks.tasks()[0].solution)]})
    state = json.loads(solved["state"])
    begins = len(state["supervisor"]) - 1
    wrong: list[Any] = ["", "{", "[]", "null", "{}", "\ud7ff"]
    changes = (["ATTACH DATABASE 'x' AS y", [], False], ["DROP TABLE notes", [], False], ["DELETE", [], False], 5)
    wrong += [{**state, "simple_note": [*state["simple_note"], change]} for change in changes]
    wrong.append({**state, "supervisor": state["supervisor"][begins:]})
    wrong.append({**state, "phone": [["INSERT INTO no_such_table VALUES (1)", [], False]]})
    wrong.append({app: changes for app, changes in state.items() if app != "venmo"})
    texts = [entry if isinstance(entry, str) else json.dumps(entry) for entry in wrong]
    same, *others = play(*({"task": FIRST, "state": text} for text in (solved["state"], *texts)))
    assert same["reward"] == 1.0
    for text, outcome in zip(texts, others, strict=True):
        assert outcome["reward"] == 0.0, text[-120:]
        assert outcome["details"]["error"], text[-120:]


def test_a_change_beside_the_task_is_found_without_being_told(play: Player) -> None:
    """The state says nothing of which tables have changed: a row added by hand in another app is seen all the same."""
    job = {"task": FIRST, "actions": [block(appworld_tasks.tasks()[0].solution)]}
    other = {
        "task": FIRST,
        "actions": [block(appworld_tasks.tasks()[-1].solution.replace("complete_task", "show_profile"))],
    }
    solved, added = play(job, other)
    state, more = json.loads(solved["state"]), json.loads(added["state"])
    [outcome] = play({"task": FIRST, "state": json.dumps({**state, "todoist": more["todoist"]})})
    assert len(more["todoist"]) > len(state["todoist"])
    assert outcome["details"]["failures"] == ["only notes have changed"]
