"""The published documents of AgentScope's training sandbox run here as they stand, but for their import lines.

The blocks of a document run in order in one interpreter. What is put into the import lines, and what takes the place of
each shell command, is read from the guide, so that the guide is right.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import appworld_tasks
import documents
import pytest

import backends.agentscope
from backends.environments.catalog import find
from backends.sandboxes.docker.images import image_name
from backends.sandboxes.local import UNSAFE_VARIABLE
from bench.strikes import docker

if TYPE_CHECKING:
    from documents import Ran

ROOT: Final = Path(__file__).parents[2]
SEEDS: Final = ROOT.parent / "shared" / "seeds"
GUIDE: Final = (ROOT / "docs" / "agentscope.md").read_text(encoding="utf-8")
DOCUMENTS: Final = {"saved page, Chinese": "000", "notebook, Chinese": "001", "notebook, English": "003"}
WITH_BFCL: Final = ("000", "003")
SOURCE: Final = "002"
"""The published source of the classes."""
METHOD: Final = re.compile(r"^def (\w+)\(\n?(self.*?)\)(?: -> \w+)?:$", re.MULTILINE | re.DOTALL)
LIMIT_S: Final = 100.0
IMAGE_S: Final = 400.0
"""What a document may take that needs an image which has to be built first."""
ENVIRONMENT: Final = {"OPENAI_API_KEY": "any text", "DATASET_SUB_TYPE": None, UNSAFE_VARIABLE: "1"}


def seed(number: str) -> str:
    """A document's text."""
    found = sorted(SEEDS.glob(f"{number}_*.txt"))
    if not found:
        pytest.skip(f"the documents of AgentScope are not at {SEEDS}")
    return found[0].read_text(encoding="utf-8")


def table(heading: str) -> dict[str, str]:
    """A table of the guide by the heading of its first column."""
    rows = GUIDE.partition(f"| {heading} |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [re.findall(r"`(.+?)`", row) for row in rows]
    return {theirs: here for theirs, here, *_ in cells}


def programs(number: str) -> list[str]:
    """A document's blocks with this project's imports."""
    return [documents.imported_from(block, table("module there")) for block in documents.blocks(seed(number))]


def split_up(blocks: list[str]) -> tuple[list[str], list[str]]:
    """The blocks about AppWorld, and those about BFCL behind them."""
    first = next((n for n, block in enumerate(blocks) if "BFCLSandbox" in block), len(blocks))
    return blocks[:first], blocks[first:]


@pytest.mark.parametrize("number", DOCUMENTS.values(), ids=DOCUMENTS)
def test_only_import_lines_change(number: str) -> None:
    """Every block that is found can be compiled, and none is missed."""
    before, after = documents.blocks(seed(number)), programs(number)
    assert [len(part) for part in split_up(after)] == {"000": [6, 4], "001": [6, 0], "003": [6, 5]}[number]
    for old, new in zip(before, after, strict=True):
        ast.parse(new)
        changed = [(a, b) for a, b in zip(old.splitlines(), new.splitlines(), strict=True) if a != b]
        assert len(changed) == old.count("agentscope_runtime")
        assert all(b.startswith("from backends.agentscope import") for _, b in changed)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home of the project's with synthetic tasks of AppWorld: the real ones must not be given on."""
    if not find("appworld").installed:
        message = "environment appworld is not installed: run `rollout env install appworld`"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    made = appworld_tasks.write(find("appworld").interpreter(), tmp_path_factory.mktemp("appworld"))
    return appworld_tasks.settle(tmp_path_factory.mktemp("home"), made)


@pytest.mark.parametrize("number", DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_whole_document(number: str, home: Path) -> None:
    blocks = programs(number)
    ran = documents.run(blocks, {**ENVIRONMENT, "ROLLOUT_HOME": str(home)}, timeout=LIMIT_S)
    about_appworld = len(split_up(blocks)[0])
    check_appworld(ran[:about_appworld])
    if about_appworld < len(ran):
        check_bfcl(ran[about_appworld:])


@pytest.mark.usefixtures("containers")
@pytest.mark.timeout(IMAGE_S + LIMIT_S)
def test_a_whole_document_in_containers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user has it who accepts no risk: the agent's code runs in a container, whose image is made where needed."""
    monkeypatch.setenv("ROLLOUT_HOME", str(home))
    try:
        check_appworld(documents.run(programs("001"), {**ENVIRONMENT, UNSAFE_VARIABLE: None}, timeout=IMAGE_S))
    finally:
        docker("image", "rm", image_name(find("appworld")), check=False)  # of use to this test alone


@pytest.mark.parametrize("number", WITH_BFCL)
def test_the_bfcl_script_alone(number: str) -> None:
    if not find("bfcl").installed:
        pytest.fail("environment bfcl is not installed: run `rollout env install bfcl`")
    check_bfcl(documents.run(split_up(programs(number))[1], ENVIRONMENT, timeout=LIMIT_S))


def check_appworld(ran: list[Ran]) -> None:
    """Listed the tasks, opened the first, ran its code, graded it (nothing has been done yet), and released it."""
    train = appworld_tasks.splits()["train"]
    verified, reviewed, created, stepped, graded, released = ran
    assert verified.stdout == f"{train[0]}\n"
    assert reviewed.stdout in (f"{train[0]}\n", f"{train}\n")
    names = created.names
    assert names["profile_list"] == train
    assert created.stdout == f"Created instance {names['instance_id']} with query: {names['query']}\n"
    assert [message["role"] for message in names["query"]] == ["system", "user"]
    assert appworld_tasks.tasks()[0].instruction in names["query"][1]["content"]
    result = stepped.names["result"]
    assert "hello appworld!!" in result["state"][0]["content"]
    assert (result["reward"], result["is_terminated"]) == (0.0, False)
    if "score" in graded.names:  # the English document steps once more instead
        assert graded.stdout == "Evaluation score: 0.0\n"
    assert released.stdout == "Instance released: True\n"


def check_bfcl(ran: list[Ran]) -> None:
    """Opened the first task, played its four turns, earned the reward, and released it."""
    begun, ended = ran[0].names, ran[-1].names
    assert begun["profile_list"][0] == "multi_turn_base_0"
    assert [message["role"] for message in begun["query"]] == ["system", "user"]
    assert begun["init_response"]["info"]["instance_id"] == begun["inst_id"]
    printed = "".join(block.stdout for block in ran)
    turns: list[Any] = re.findall(r"^\[TURN (\d)\] term=(\w+) reward=([\d.]+)$", printed, re.MULTILINE)
    assert turns == [(str(n), str(n == 8), str(float(n == 8))) for n in range(1, 9)]
    assert "[RESULT] sparse_score = 1.0" in printed
    assert ended["score"] == 1.0
    assert ended["res"]["is_terminated"]


@pytest.mark.parametrize("number", DOCUMENTS.values(), ids=DOCUMENTS)
def test_every_command_has_its_counterpart(number: str) -> None:
    """A command counts as documented where a row of the guide has its shape; the row's own command exists."""
    rows = table("command there")
    commands = re.findall(r"^(?:\S+:)?((?:docker|pip) .+)$", seed(number), re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        (here,) = [mine for theirs, mine in rows.items() if _shape(theirs).match(" ".join(command.split()))]
        assert here.startswith(("rollout env install ", "rollout image build ", "pip install ."))


def _shape(row: str) -> re.Pattern[str]:
    return re.compile(r"[^ ]*".join(map(re.escape, re.split(r"\.\.\.|NAME|TAG", row.removesuffix(" ...")))))


def test_the_published_source_s_methods_are_all_here() -> None:
    """Same classes, same methods, same parameters in the same order."""
    source = seed(SOURCE)
    seen = 0
    for name, body in re.findall(r"^class (\w+)\(\w+\):\n(.*?)(?=^class |\Z)", source, re.MULTILINE | re.DOTALL):
        ours = getattr(backends.agentscope, name)
        for method, parameters in re.findall(
            r"^def (\w+)\(\n?(self.*?)\)(?: -> \w+)?:$", body, re.MULTILINE | re.DOTALL
        ):
            theirs = re.findall(r"(?:^|,)\s*(\w+)(?=[:,\s]|$)", parameters)
            code = getattr(ours, method).__code__
            assert list(code.co_varnames[: len(theirs)]) == theirs, f"{name}.{method}"
            seen += 1
    assert seen >= 10
