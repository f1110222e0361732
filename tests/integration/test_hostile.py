"""Sandboxes that break the protocol: each is condemned with a clear failure, and the run completes without it."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from runs import Counted, Played, counting, counting_from, equal, play

from backends.environments.catalog import find, stage
from backends.sandboxes import listener, local
from backends.sandboxes.link import MESSAGE_CAP
from backends.sandboxes.local import LocalBackend
from orchestrator.types import FailureKind, Outcome

if TYPE_CHECKING:
    from orchestrator.protocols import EpisodeContext
    from orchestrator.records import ConversationView

EPISODES = 32
PROTOCOL, LOST, HUNG, START = (
    FailureKind.PROTOCOL, FailureKind.SANDBOX_LOST, FailureKind.SANDBOX_HUNG, FailureKind.SANDBOX_START,
)  # fmt: skip


class HostileBackend(LocalBackend):
    """Its first server is the hostile one; the digest is the real environment's."""

    def __init__(self, folder: Path) -> None:
        super().__init__("toy")
        self._folder = folder

    async def __aenter__(self) -> HostileBackend:
        await super().__aenter__()
        self._program = replace(self._need_program(), staged=self._folder)
        return self


def arm(folder: Path, attack: dict[str, Any]) -> HostileBackend:
    """Lay the real server out with the hostile one in front of it, under the real one's digest."""
    staged = stage(find("toy"))
    folder /= staged.name
    shutil.copytree(staged, folder)
    server = folder / "backends" / "server"
    (server / "__main__.py").rename(server / "honest.py")
    shutil.copy(Path(__file__).with_name("hostile_server.py"), server / "__main__.py")
    (folder / "attack.json").write_bytes(orjson.dumps(attack))
    return HostileBackend(folder)


async def attacked(tmp_path: Path, attack: dict[str, Any], **options: Any) -> tuple[Played, Counted]:
    backend = await asyncio.to_thread(arm, tmp_path / "hostile", attack)
    policy = Counted(counting)
    options = {"episodes": EPISODES, "all_up": "name" in attack, **options}
    played = await play(tmp_path / "run", policy, backend=backend, **options)
    return played, policy


def check_unharmed(played: Played, policy: Counted) -> None:
    """Every episode ended well, nothing was asked for twice, nobody was blamed."""
    assert played.summary.state == "finished"
    assert played.summary.outcomes == {"completed": EPISODES}
    assert played.summary.reward_one == EPISODES
    assert all(one.failure is None and one.attempt == 0 for one in played.episodes.values())
    assert policy.repeated() == 0


FRAMES = {
    "random_bytes": "header",
    "huge_frame": "",
    "huge_body": "over the cap of 4194304",
    "deep_header": "not JSON",
    "long_header": "at most 4096 entries",
    "bodies_do_not_add_up": "do not add up",
    "never_made": "was never made or is answered already",
    "answered_twice": "was never made or is answered already",
    "error_for_nobody": "was never made or is answered already",
    "error_no_json": "an error's body is not JSON",
    "unknown_status": "unknown status 9",
    "reward_not_finite": "",
    "false_toolset": "does not match its digest",
    "text_frame": "a TEXT message, not a frame",
}


@pytest.mark.parametrize("name", FRAMES)
async def test_a_frame_against_the_protocol(name: str, tmp_path: Path) -> None:
    played, policy = await attacked(tmp_path, {"name": name, "at": 4})
    check_unharmed(played, policy)
    [loss] = played.losses()
    assert loss.failure.kind is PROTOCOL
    assert FRAMES[name] in loss.failure.message
    assert len(loss.failure.message) < 500


@pytest.mark.parametrize("name", ["hangs_up", "closes_mid_frame", "exits"])
async def test_a_connection_that_ends(name: str, tmp_path: Path) -> None:
    played, policy = await attacked(tmp_path, {"name": name, "at": 4})
    check_unharmed(played, policy)
    [loss] = played.losses()
    assert loss.failure.kind in {LOST, PROTOCOL}


async def test_a_sandbox_that_answers_nothing(tmp_path: Path) -> None:
    played, policy = await attacked(tmp_path, {"name": "answers_nothing", "at": 4}, step_timeout_s=0.2)
    check_unharmed(played, policy)
    [loss] = played.losses()
    assert loss.failure.kind is HUNG
    assert "no answer for" in loss.failure.message


async def test_one_answer_that_never_comes_among_others_that_do(tmp_path: Path) -> None:
    def act(view: ConversationView, ctx: EpisodeContext) -> str:
        return "add 0" if view.turn < 20 else counting_from(20, view)

    backend = await asyncio.to_thread(arm, tmp_path / "hostile", {"name": "withholds_one_answer", "at": 4})
    policy = Counted(act, think_s=0.15)  # so that others are answered until the withheld one is missed
    played = await play(tmp_path / "run", policy, backend=backend, step_timeout_s=0.1, episodes=EPISODES, all_up=True)
    check_unharmed(played, policy)
    [loss] = played.losses()
    assert loss.failure.kind is HUNG
    assert "a call was left unanswered for 2." in loss.failure.message


class TestGreetings:
    """Whoever does not greet properly never becomes a sandbox."""

    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(listener, "HELLO_S", 0.3)
        monkeypatch.setattr(local, "START_S", 3.0)

    @pytest.mark.parametrize(
        ("attack", "kind", "says"),
        [
            ({"exit": 3}, START, "exited with code 3 while starting"),
            ({"hello": {"token": "guessed"}}, START, ""),
            ({"hello": {"protocol": 999}}, PROTOCOL, "speaks protocol 999, this version 1: stage it anew"),
            ({"hello": {"isolation": "none"}}, START, ""),
            ({"hello": {"max_turns": -5}}, START, ""),
            ({"hello": {"pid": "x" * 5000}}, START, ""),
            ({"greeting": "nothing"}, START, "exited with code 7"),
            ({"greeting": "text"}, START, "exited with code 7"),
            ({"greeting": "binary"}, START, "exited with code 7"),
            ({"greeting": "huge"}, START, "exited with code 7"),
            ({"greeting": "list"}, START, "exited with code 7"),
        ],
    )
    async def test_a_bad_greeting(self, attack: dict[str, Any], kind: FailureKind, says: str, tmp_path: Path) -> None:
        played, policy = await attacked(tmp_path, attack, sandboxes=1)
        check_unharmed(played, policy)
        [refused] = played.losses()
        assert refused.failure.kind is kind
        assert says in refused.failure.message

    @pytest.mark.parametrize("field", ["digest", "environment"])
    async def test_another_environment_than_was_started(self, field: str, tmp_path: Path) -> None:
        played, policy = await attacked(tmp_path, {"hello": {field: "another"}}, sandboxes=1)
        check_unharmed(played, policy)
        [refused] = played.losses()
        assert refused.failure.kind is PROTOCOL
        assert "another" in refused.failure.message
        assert "was started" in refused.failure.message


@pytest.mark.parametrize("name", ["tasks_no_json", "tasks_of_wrong_types"])
async def test_a_malformed_list_of_tasks(name: str, tmp_path: Path) -> None:
    played, policy = await attacked(tmp_path, {"name": name, "at": 1}, sandboxes=1)
    check_unharmed(played, policy)
    [loss] = played.losses()
    assert (loss.failure.kind, loss.failure.message) == (PROTOCOL, "the sandbox's task list is malformed")


async def test_an_error_with_an_endless_message(tmp_path: Path) -> None:
    """It is within the protocol, and its message is cut before anybody keeps it."""
    played, _ = await attacked(tmp_path, {"name": "shouting_error", "at": 4}, concurrency=1, sandboxes=1, episodes=4)
    failures = [one.failure for one in played.episodes.values() if one.failure is not None]
    assert failures
    assert {len(failure.message) for failure in failures} == {MESSAGE_CAP}


async def test_equal_to_a_run_with_honest_sandboxes(tmp_path: Path) -> None:
    honest = await play(tmp_path / "honest", Counted(counting), episodes=EPISODES)
    disturbed, _ = await attacked(tmp_path, {"name": "answered_twice", "at": 9})
    assert disturbed.summary.recovered_episodes > 0
    assert equal(honest.episodes, disturbed.episodes)
    assert {one.outcome for one in disturbed.episodes.values()} == {Outcome.COMPLETED}
