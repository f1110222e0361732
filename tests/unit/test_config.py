"""Configuration: a file and the command line become one frozen model; what is refused is shown where it stands."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given as examples
from hypothesis import strategies as st

from orchestrator.cli.config import Chat, Local, Replay, RunConfig, Scripted, load, stored
from orchestrator.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from pathlib import Path

WHOLE = """\
env: bfcl
split: multi_turn_base:train
policy:
  kind: chat
  model: qwen
  base_url: http://localhost:8000/v1
  temperature: 0.7
  extra: {top_k: 20}
backend: local
group_size: 8
concurrency: 512
step_timeout: 10
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(folder: Path, text: str, **given: object) -> str:
    with pytest.raises(UsageError) as caught:
        load(write(folder, text), given)
    return str(caught.value).replace(f"{folder}/", "")


def test_options_alone() -> None:
    config = load(None, {"env": "toy", "concurrency": 7, "skill": 0.5, "task_id": ("a", "b")})
    assert config == RunConfig(env="toy", concurrency=7, policy=Replay(kind="replay", skill=0.5), task_id=("a", "b"))


def test_a_file_alone(tmp_path: Path) -> None:
    config = load(write(tmp_path, WHOLE), {})
    assert isinstance(config.policy, Chat)
    assert config.policy.temperature == 0.7
    assert config.policy.extra == {"top_k": 20}
    assert config.backend == Local(kind="local")
    assert (config.group_size, config.concurrency, config.step_timeout) == (8, 512, 10.0)


def test_options_of_the_environment(tmp_path: Path) -> None:
    words = ["mode=text_rich", "actions=true", "price_seed=7", "empty=", "note=a=b"]
    options = load(None, {"env": "webshop", "env_option": words}).env_option
    assert options == {"mode": "text_rich", "actions": True, "price_seed": 7, "empty": "", "note": "a=b"}
    assert load(write(tmp_path, "env: webshop\nenv_option: {actions: true}\n"), {}).env_option == {"actions": True}
    with pytest.raises(UsageError, match=r"--env-option: .*an option is KEY=VALUE, not 'actions'"):
        load(None, {"env": "webshop", "env_option": ["actions"]})


def test_options_override_the_file_key_by_key(tmp_path: Path) -> None:
    config = load(write(tmp_path, WHOLE), {"group_size": 2, "model": "other", "max_tokens": 99})
    assert isinstance(config.policy, Chat)
    assert (config.policy.model, config.policy.max_tokens, config.policy.temperature) == ("other", 99, 0.7)
    assert (config.group_size, config.concurrency) == (2, 512)


def test_another_policy_replaces_the_files_policy(tmp_path: Path) -> None:
    path = write(tmp_path, WHOLE)
    assert load(path, {"policy": "replay"}).policy == Replay(kind="replay")
    assert load(path, {"policy": "scripted", "script": "a.py:f"}).policy == Scripted(kind="scripted", script="a.py:f")
    assert load(path, {"policy": "chat"}).policy == load(path, {}).policy


def test_what_is_stored_comes_back_equal(tmp_path: Path) -> None:
    config = load(write(tmp_path, WHOLE), {"out": tmp_path / "run"})
    assert stored(config.model_dump(mode="json"), {}) == config
    changed = stored(config.model_dump(mode="json"), {"concurrency": 3, "base_url": "http://other/v1"})
    assert isinstance(changed.policy, Chat)
    assert (changed.concurrency, changed.policy.base_url, changed.policy.model) == (3, "http://other/v1", "qwen")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("env: toy\npolicy:\n  kind: replay\n  skill: 3\n", "run.yaml:4: policy.replay.skill: Input should be less"),
        ("env: toy\nconcurency: 3\n", "run.yaml:2: concurency: Extra inputs.*did you mean 'concurrency'"),
        ("env: toy\npolicy:\n  kind: replay\n  model: x\n", "run.yaml:4: .*does not belong to policy replay"),
        ("env: toy\n\npolicy: repla\n", "run.yaml:3: policy: .*'repla'.*'replay', 'scripted', 'chat'"),
        ("env: toy\npolicy: {kind: chat, base_url: http://x}\n", "run.yaml:2: policy.chat.model: Field required"),
        ("env: toy\ntask_id:\n- a\n- [1]\n", r"run.yaml:4: task_id.1: Input should be a valid string, not \[1\]"),
        ("env: toy\nconcurrency: 0\n", "run.yaml:2: concurrency: Input should be greater than 0, not 0"),
        ("env: toy\nstep_timeout: .inf\n", "run.yaml:2: step_timeout: Input should be a finite number"),
        ("split: x\n", "run.yaml:1: env: Field required .give --env"),
        ("env: toy\nenv: bfcl\n", "run.yaml:2: 'env' is given twice"),
        ("env: toy\n  split: x\n", "run.yaml:2: not YAML: mapping values are not allowed here"),
        ("env: !!python/object/apply:os.system [true]\n", "run.yaml:1: not YAML: could not determine a constructor"),
        ("- env\n", "run.yaml:1: a configuration is a mapping"),
        ("env: toy\nseed: -1\n", "run.yaml:2: seed: Input should be greater than or equal to 0"),
    ],
)
def test_what_a_file_gets_wrong_is_shown_with_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    assert re.match(complaint, refused(tmp_path, text)), refused(tmp_path, text)


def test_every_wrong_value_is_shown(tmp_path: Path) -> None:
    lines = refused(tmp_path, "env: toy\nseed: x\ngroup_size: 0\n").splitlines()
    assert [line.split(": ")[0] for line in lines] == ["run.yaml:3", "run.yaml:2"]


def test_what_an_option_gets_wrong_is_shown_as_the_option(tmp_path: Path) -> None:
    assert refused(tmp_path, "env: toy\n", skill=2.0).startswith("--skill: Input should be less than or equal to 1")
    assert refused(tmp_path, "env: toy\n", model="m").startswith("--model: Extra inputs are not permitted (it does not")
    assert refused(tmp_path, "env: toy\n", policy="scripted", script="a.py").startswith("--script: String should match")
    chat = {"policy": "chat", "model": "m"}
    assert refused(tmp_path, "env: toy\n", **chat, base_url="http://me:secret@host/v1").startswith("--base-url: String")
    with pytest.raises(UnknownName, match="unknown policy 'chatt'; did you mean 'chat'"):
        load(None, {"env": "toy", "policy": "chatt"})


def test_an_option_that_would_change_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give --split or --task-id, not both"):
        load(write(tmp_path, "env: toy\nsplit: toy:val\n"), {"task_id": ("toy_1",)})
    for backend in ("ray", "docker"):
        with pytest.raises(UsageError, match=f"give --shards or --backend {backend}, not both"):
            load(None, {"env": "toy", "shards": 2, "backend": backend})
    with pytest.raises(UsageError, match="--ray-cpus is for --backend ray and for --shards"):
        load(None, {"env": "toy", "ray_cpus": 2})
    with pytest.raises(UsageError, match="name it with --consumer"):
        load(None, {"env": "toy", "max_unacked": 3})
    assert load(None, {"env": "toy", "max_unacked": 3, "consumer": "trainer"}).max_unacked == 3


def test_a_missing_file_and_a_folder_say_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the configuration .*none\.yaml"):
        load(tmp_path / "none.yaml", {})
    with pytest.raises(UsageError, match="cannot read the configuration"):
        load(tmp_path, {})


@examples(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_no_stored_value_gets_past_the_models(values: object) -> None:
    try:
        config = stored({"env": "toy", "policy": values}, {})
    except UsageError:
        return
    assert isinstance(config.policy, Replay)


def test_a_resume_is_over_other_shards_another_cluster_or_none() -> None:
    before = load(None, {"env": "toy", "shards": 2, "ray_address": "one:6379"}).model_dump(mode="json")
    other = stored(before, {"shards": 3, "ray_address": "other:6379"})
    assert (other.shards, other.ray_address) == (3, "other:6379")
    assert stored(before, {"shards": 0}).shards is None
    with pytest.raises(UsageError, match="--ray-address is for --backend ray and for --shards"):
        stored(before, {"shards": 0, "ray_address": "other:6379"})
    with pytest.raises(UsageError, match="not both"):
        stored(load(None, {"env": "toy", "backend": "ray"}).model_dump(mode="json"), {"shards": 2})
