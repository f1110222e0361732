"""The pure parts of the training sandbox's classes: the registry, splits by variable, and the shapes of values."""

from __future__ import annotations

import platform
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from backends.agentscope import SandboxRegistry, SandboxType, TrainingSandbox, dialect, get_image_tag, shapes, splits
from backends.agentscope.boxes import APPWorldSandbox, BFCLSandbox, WebShopSandbox
from backends.agentscope.host import choose
from backends.environments.catalog import find
from backends.sandboxes.docker import DockerBackend
from backends.sandboxes.local import LocalBackend
from orchestrator.errors import UnknownName, UsageError
from orchestrator.types import Evaluation, Observation

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("machine", "tag"),
    [("x86_64", "latest"), ("AMD64", "latest"), ("aarch64", "latest-arm64"), ("arm64", "latest-arm64")],
)
def test_the_image_tag_is_the_machines(monkeypatch: pytest.MonkeyPatch, machine: str, tag: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert get_image_tag() == tag


def test_the_kinds_of_the_original() -> None:
    kinds = {SandboxType.APPWORLD: APPWorldSandbox, SandboxType.BFCL: BFCLSandbox, SandboxType.WEBSHOP: WebShopSandbox}
    for kind, box in kinds.items():
        assert SandboxRegistry.get_classes_by_type(kind) is box
        assert SandboxRegistry.get_image_by_type(kind.value) == f"agentscope/runtime-sandbox-{kind}:{get_image_tag()}"
        assert box().sandbox_type is kind
    assert TrainingSandbox().sandbox_type is SandboxType.APPWORLD


def test_a_kind_of_ones_own() -> None:
    @SandboxRegistry.register(
        "mine/box:1",
        sandbox_type="my_box",
        runtime_config={"shm_size": "1gb"},
        security_level="high",
        timeout=7,
        environment={"A": "b"},
        description="mine",
    )
    class MyBox(TrainingSandbox):
        pass

    kind = SandboxType("my_box")
    assert (kind, kind.value, kind.name) == ("my_box", "my_box", "MY_BOX")
    assert SandboxType("my_box") is kind
    assert MyBox().sandbox_type is kind
    config = SandboxRegistry.get_config(MyBox)
    assert config is not None
    assert (config.image_name, config.timeout, config.environment) == ("mine/box:1", 7, {"A": "b"})
    assert SandboxRegistry.get_config_by_type("my_box") is config
    assert SandboxRegistry.list_all_sandboxes()[MyBox] is config


def test_what_the_registry_refuses() -> None:
    with pytest.raises(UsageError, match="image"):
        SandboxRegistry.register("", sandbox_type="x")
    with pytest.raises(UsageError, match="timeout"):
        SandboxRegistry.register("image", sandbox_type="x", timeout=0)
    with pytest.raises(UnknownName, match="'bfcl'"):
        SandboxRegistry.get_image_by_type("bfc")
    with pytest.raises(ValueError, match="nobody's"):
        SandboxType("nobody's")


@pytest.mark.parametrize(
    ("environment", "split", "variables", "asked"),
    [
        ("bfcl", "train", {}, "multi_turn:train"),
        ("bfcl", "val", {"DATASET_SUB_TYPE": "live"}, "live:val"),
        ("bfcl", "train", {"DATASET_SUB_TYPE": ""}, "multi_turn:train"),
        ("bfcl", "train", {"BFCL_DATA_PATH": "/in/the/image/non_live_processed.jsonl"}, "non_live:train"),
        ("bfcl", "train", {"BFCL_SPLID_ID_PATH": "/none/all_scoring_split_ids.json"}, "all_scoring:train"),
        ("bfcl", "val", {"DATASET_SUB_TYPE": "all", "BFCL_DATA_PATH": "/none/live_processed.jsonl"}, "all:val"),
        ("bfcl", "live_simple:val", {"DATASET_SUB_TYPE": "all"}, "live_simple:val"),
        ("appworld", "train", {"DATASET_SUB_TYPE": "live"}, "train"),
    ],
)
def test_splits_by_variable(environment: str, split: str, variables: dict[str, str], asked: str) -> None:
    assert splits.resolve(environment, split, variables) == asked


def test_a_split_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"train": ["multi_turn_base_3"], "val": 4}', encoding="utf-8")
    variables = {"BFCL_SPLID_ID_PATH": str(path), "DATASET_SUB_TYPE": "live"}
    assert splits.resolve("bfcl", "train", variables) == ["multi_turn_base_3"]
    with pytest.raises(UsageError, match="list of ids"):
        splits.resolve("bfcl", "val", variables)
    path.write_text('{"train": []}', encoding="utf-8")
    with pytest.raises(UnknownName, match="'val'"):
        splits.resolve("bfcl", "val", variables)
    path.write_text("train", encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be read"):
        splits.resolve("bfcl", "train", variables)
    with pytest.raises(UsageError, match="does not exist"):
        splits.resolve("bfcl", "train", {"BFCL_SPLID_ID_PATH": str(tmp_path / "gone.json")})


def _observed(*messages: dict[str, Any], done: bool = False, **more: Any) -> Observation:
    return Observation(orjson.dumps({"messages": messages, **more}), 0.5, done)


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_an_opening_with_tools_and_without() -> None:
    body = _observed({"role": "system", "content": "Be kind."}, _user("hello")).body
    assert dialect.opening(body, []) == [{"role": "system", "content": "Be kind."}, _user("hello")]
    system, user = dialect.opening(body, [{"type": "function", "function": {"name": "ls"}}])
    assert system["content"].startswith("Be kind.\n\n")
    assert '<tools>\n{"type":"function","function":{"name":"ls"}}\n</tools>' in system["content"]
    assert user == _user("hello")


def test_answers() -> None:
    answer = shapes.answer(_observed(_user("a"), _user("b")))
    assert answer == {
        "state": [{**_user("a\n\nb"), "tool_calls": []}],
        "reward": 0.5,
        "is_terminated": False,
        "info": {},
    }
    assert shapes.answer(_observed(done=True), 1.0)["state"][0]["content"] == shapes.COMPLETED
    assert shapes.answer(_observed(done=True), 1.0)["reward"] == 1.0
    results = [{"role": "tool", "tool_call_id": str(n), "content": "same"} for n in range(2)]
    assert [m["tool_call_id"] for m in shapes.answer(_observed(*results))["state"]] == ["0", "1"]
    appeared = shapes.answer(_observed(_user("now"), tools_added=[{"name": "new"}]))["state"]
    assert [m["content"] for m in appeared] == ['{"name":"new"}\nnow']
    alone = shapes.answer(_observed(tools_added=[{"name": "new"}]))["state"]
    assert [m["content"] for m in alone] == ['{"name":"new"}']


def test_blocks_become_calls_and_their_answers_blocks() -> None:
    block = '<tool_call>\n{"name": "ls", "arguments": {"a": true}}\n</tool_call>'
    action, as_text = shapes.action(f"Look:\n{block}\n{block}")
    assert as_text
    message = orjson.loads(action)
    assert (message["role"], message["content"]) == ("assistant", "Look:")
    assert [call["id"] for call in message["tool_calls"]] == ["call_0", "call_1"]
    assert message["tool_calls"][1]["function"] == {"name": "ls", "arguments": '{"a":true}'}
    results = [{"role": "tool", "tool_call_id": f"call_{n}", "content": f"r{n}"} for n in range(2)]
    (state,) = shapes.answer(_observed(*results, _user("and?")), as_text=True)["state"]
    assert state["content"] == ("<tool_response>\nr0\n</tool_response>\n<tool_response>\nr1\n</tool_response>\n\nand?")


@pytest.mark.parametrize(
    "text",
    [
        "no call",
        "<tool_call>{}</tool_call>",
        "<tool_call>not JSON</tool_call>",
        '<tool_call>{"name": "ls", "arguments": {}}',
        '<tool_call>{"name": "ls", "arguments": "a"}</tool_call>',
        '<think><tool_call>{"name": "ls", "arguments": {}}</tool_call></think>',
    ],
)
def test_what_is_no_readable_call_is_left_as_it_is(text: str) -> None:
    assert shapes.action(text) == (orjson.dumps({"role": "assistant", "content": text}), False)


def test_openai_calls_are_left_as_they_are() -> None:
    message = {"role": "assistant", "content": "<tool_call>", "tool_calls": [{"id": "a"}]}
    assert shapes.action(message) == (orjson.dumps(message), False)


def test_scores() -> None:
    grade = Evaluation(0.0, b'{"valid":false,"error_type":"t","error_message":"m","turns":[1,2,3]}')
    assert shapes.questions(grade) == 3
    assert shapes.score("bfcl", "simple_python_7", grade, sparse=True, turns=2, done=False) == 0.0
    assert shapes.score("toy", "toy_0", Evaluation(0.25), sparse=False, turns=2, done=False) == 0.25
    report = shapes.score("bfcl", "simple_python_7", grade, sparse=False, turns=2, done=False)
    assert report == {
        "valid": False,
        "accuracy": 0.0,
        "total_count": 1,
        "correct_count": 0,
        "test_category": "simple_python",
        "test_id": "simple_python_7",
        "model_name": "env_handler",
        "input_tokens": 0,
        "output_tokens": 0,
        "turn_count": 2,
        "completed": False,
        "error_type": "t",
        "error_message": "m",
    }


def test_actions_and_parameters() -> None:
    assert shapes.action("hi") == (b'{"role":"assistant","content":"hi"}', False)
    for wrong in ({}, None, ["hi"], 3):
        with pytest.raises(UsageError, match="assistant"):
            shapes.action(wrong)
    assert shapes.options({"simple": True, "model_name": "label"}) == {"simple": True}
    for name in ("data_path", "answer_path"):
        with pytest.raises(UsageError, match=name):
            shapes.options({name: "/etc/passwd"})


def test_code_runs_in_containers_unless_the_risk_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = find("toy")
    assert isinstance(choose(spec), LocalBackend)
    monkeypatch.delenv("ROLLOUT_UNSAFE_LOCAL", raising=False)
    assert isinstance(choose(replace(spec, runs_code=True)), DockerBackend)
    monkeypatch.setenv("ROLLOUT_UNSAFE_LOCAL", "1")
    assert isinstance(choose(replace(spec, runs_code=True)), LocalBackend)


def test_without_a_daemon_the_error_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ROLLOUT_UNSAFE_LOCAL", raising=False)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    unsafe = replace(find("toy"), runs_code=True)
    monkeypatch.setattr("backends.agentscope.host.find", lambda name: unsafe)
    with pytest.raises(UsageError, match="ROLLOUT_UNSAFE_LOCAL=1"):
        TrainingSandbox(box_type="toy").start()
