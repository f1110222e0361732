"""The benchmarks through the real command at tiny sizes, and what each says when the thing measured is broken."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import orjson
import pytest

from backends.sandboxes.local import LocalBackend
from bench import bare_run, engine_run, hold_run, lives, overhead, processes
from bench.answers import LoggedCall
from bench.lives import Ward
from bench.trials import Trial, _count_calls, _judge
from bench.values import Sizes
from bench.verdict import Evidence, Fingerprint, Verdict, judge
from bench.workers import work
from bench.workloads import Workload, _read
from orchestrator import Orchestrator
from orchestrator.errors import RunFailed
from orchestrator.types import EpisodeKey
from policies.agents.replay import ReplayPolicy

SPLIT = "multi_turn_base"
SMALL: dict[str, Any] = {"split": SPLIT, "sandboxes": 1, "seed": 0}
RIGHT = Fingerprint("completed", "done", 1.0, "0" * 16)
KEYS = [EpisodeKey("task", group, sample) for group in range(2) for sample in range(2)]
EXPECTED = dict.fromkeys(KEYS, RIGHT)


def rollout(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", "from orchestrator.cli.main import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=110, check=False)


def bench(name: str, *arguments: str, cwd: Path) -> dict[str, Any]:
    """Run a scenario; what it printed last, after checking what it wrote."""
    ended = rollout("bench", name, "--json", *arguments, cwd=cwd)
    assert ended.returncode == 0, ended.stderr
    result: dict[str, Any] = orjson.loads(ended.stdout.splitlines()[-1])
    folder = cwd / "bench-results"
    document = orjson.loads((folder / f"{name}.json").read_bytes())
    assert document["result"] == result
    assert document["rounds"]
    assert document["machine"]["cores"] == os.cpu_count()
    assert document["versions"]["python"]
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.json", f"{name}.png"], "scratch files are left"
    return result


class TestCommand:
    def test_overhead(self, tmp_path: Path) -> None:
        result = bench("overhead", "--episodes", "40", "--seed", "3", cwd=tmp_path)
        for name in ("cpu_us_per_step", "bare_us_per_step", "ratio_to_bare", "steps_per_s"):
            assert list(result[name]) == ["128", "1000", "10000"]
            assert all(value > 0 for value in result[name].values())
        assert result["held"] == {"128": False, "1000": False, "10000": False}, "40 episodes cannot hold these"
        low, high = result["journal_us_spread"]
        assert low <= result["journal_us_per_step"] <= high
        assert result["long_context"]["cpu_us_per_step"] > result["long_context"]["bare_us_per_step"] > 0

    def test_density(self, tmp_path: Path) -> None:
        result = bench("density", "--episodes", "100", cwd=tmp_path)
        assert result["episodes"] == 100
        assert result["kib_per_episode"] == pytest.approx(sum(result["opened"].values()))
        assert all(grown > 0 for grown in result["opened"].values())
        assert result["kib_per_episode_played"] > result["kib_per_episode"], "recorded steps weigh something"

    @pytest.mark.chaos
    def test_recovery(self, tmp_path: Path) -> None:
        result = bench("recovery", "--kills", "2", "--episodes", "40", "--seed", "5", cwd=tmp_path)
        assert result["kills"] == 2
        assert result["sandbox_kills"] == 2
        assert result["model_calls"] > 0
        faults = ("lost", "duplicated", "unexpected", "wrong_rewards", "wrong_trajectories", "processes_left")
        assert {name: result[name] for name in faults} == dict.fromkeys(faults, 0)
        assert result["model_calls_repeated"] <= result["model_calls_repeated_in_all"]

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("overheat",), "did you mean 'overhead'?"),
            (("density", "--kills", "3"), "--kills belongs to recovery"),
            (("density", "--episodes", "0"), "--episodes"),
            (("density", "--out", "/proc/x/y.json"), "choose another file"),
        ],
    )
    def test_wrong_use(self, arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
        ended = rollout("bench", *arguments, cwd=tmp_path)
        assert ended.returncode == 2
        assert said in ended.stderr
        assert list(tmp_path.iterdir()) == []


class TestWhenTheThingMeasuredIsBroken:
    def test_a_bare_loop_that_leaves_out_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = bare_run._scripts

        async def lazy(*arguments: Any) -> list[bare_run.Script]:
            return [script._replace(actions=script.actions[:-1]) for script in await whole(*arguments)]

        monkeypatch.setattr(bare_run, "_scripts", lazy)
        with pytest.raises(RunFailed, match="0 of 3 rewards"):
            asyncio.run(bare_run.measure(concurrency=3, episodes=3, **SMALL))

    def test_a_run_that_solves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engine_run, "ReplayPolicy", lambda: ReplayPolicy(skill=0.0))
        out = str(tmp_path / "run")
        with pytest.raises(RunFailed, match=r"of 3 rewards are 1\.0"):
            asyncio.run(engine_run.measure(out=out, concurrency=3, episodes=3, durability="episode", **SMALL))

    def test_sides_that_did_different_work(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        async def worker(module: str, **arguments: Any) -> dict[str, Any]:
            (tmp_path / "run").mkdir(exist_ok=True)
            return {"episodes": 3, "steps": 30 if module == "bench.bare_run" else 31, "running_median": 3}

        monkeypatch.setattr(overhead, "worker", worker)
        with pytest.raises(RunFailed, match="different work"):
            asyncio.run(overhead.overhead(Sizes(episodes=3), tmp_path, lambda line: None))

    def test_the_memory_of_no_episode(self, tmp_path: Path) -> None:
        with pytest.raises(RunFailed, match="hold at least one"):
            asyncio.run(hold_run.measure(out=str(tmp_path), episodes=0, **SMALL))

    def test_episodes_that_were_not_held(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        async def pass_by(gate: hold_run.Gate) -> None:
            gate.held += 1

        monkeypatch.setattr(hold_run.Gate, "hold", pass_by)
        with pytest.raises(RunFailed, match="ended although only"):
            asyncio.run(hold_run.measure(out=str(tmp_path), episodes=4, **SMALL))

    def test_a_worker_that_fails(self) -> None:
        with pytest.raises(RunFailed, match=r"bench\.hold_run \(.*\) ended with status 1:[\s\S]*hold at least one"):
            asyncio.run(work("bench.hold_run", out="", episodes=0, **SMALL))


class TestVerdict:
    def test_nothing_wrong(self) -> None:
        assert judge(EXPECTED, Evidence(list(EXPECTED.items()), KEYS, KEYS[::-1], 0)).clean

    @pytest.mark.parametrize("place", ["stored", "outbox", "consumed"])
    def test_a_key_lost_or_doubled_in_one_place(self, place: str) -> None:
        whole = Evidence(list(EXPECTED.items()), KEYS, KEYS, 0)
        lost = whole._replace(**{place: getattr(whole, place)[1:]})
        assert judge(EXPECTED, lost) == Verdict(lost=1)
        doubled = whole._replace(**{place: [*getattr(whole, place), getattr(whole, place)[0]]})
        assert judge(EXPECTED, doubled) == Verdict(duplicated=1)

    def test_a_key_lost_everywhere_counts_once(self) -> None:
        assert judge(EXPECTED, Evidence(list(EXPECTED.items())[1:], KEYS[1:], KEYS[1:], 0)) == Verdict(lost=1)

    def test_a_second_commit_that_was_refused(self) -> None:
        assert judge(EXPECTED, Evidence(list(EXPECTED.items()), KEYS, KEYS, 2)) == Verdict(duplicated=2)

    def test_another_result(self) -> None:
        changes = [
            RIGHT._replace(reward=0.0),
            RIGHT._replace(stop_reason="agent_killed_env"),
            RIGHT._replace(digest="1"),
        ]
        stored = [(KEYS[0], RIGHT), *zip(KEYS[1:], changes, strict=True)]
        assert judge(EXPECTED, Evidence(stored, KEYS, KEYS, 0)) == Verdict(wrong_rewards=2, wrong_trajectories=1)

    def test_a_key_that_nobody_asked_for(self) -> None:
        other = EpisodeKey("other", 0, 0)
        found = judge(EXPECTED, Evidence([*EXPECTED.items(), (other, RIGHT)], [*KEYS, other], [*KEYS, other], 0))
        assert found == Verdict(unexpected=1)
        assert found + found == Verdict(unexpected=2)
        assert not found.clean


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two groups of two."""
    out = tmp_path_factory.mktemp("finished") / "run"

    async def play() -> None:
        backend, policy = LocalBackend("bfcl"), ReplayPolicy(skill=0.7)
        async with Orchestrator(backend=backend, policy=policy, out=out, concurrency=4, sandboxes=1) as orch:
            await orch.run(split=SPLIT, group_size=2, episodes=4)

    asyncio.run(play())
    return out


class TestRealStore:
    """A run changed behind the store's back: what the schema itself forbids is done without it."""

    @pytest.fixture
    def run(self, finished: Path, tmp_path: Path) -> tuple[Path, Workload]:
        return shutil.copytree(finished, tmp_path / "run"), Workload("replay", (), _read(finished), 0.0, 0.0)

    def test_untouched(self, run: tuple[Path, Workload]) -> None:
        out, workload = run
        assert len(workload.expected) == 4
        assert _judge(workload, out, list(workload.expected)).clean

    @pytest.mark.parametrize(
        ("change", "found"),
        [
            ("DELETE FROM trajectories WHERE sample = 0 AND grp = 0 AND task LIKE '%_0'", Verdict(lost=1)),
            ("DELETE FROM outbox WHERE seq = 1", Verdict(lost=2)),
            ("UPDATE trajectories SET reward = reward - 0.5 WHERE rowid = 1", Verdict(wrong_rewards=1)),
            (
                "UPDATE trajectories SET buffer = substr(buffer, 1, length(buffer) - 40) WHERE rowid = 1",
                Verdict(wrong_trajectories=1),
            ),
            ("UPDATE run SET duplicates = 1", Verdict(duplicated=1)),
            (
                "DROP TRIGGER whole; CREATE TABLE copy AS SELECT * FROM trajectories; DROP TABLE trajectories;"
                "ALTER TABLE copy RENAME TO trajectories;"
                "INSERT INTO trajectories SELECT * FROM trajectories WHERE rowid = 1",
                Verdict(duplicated=2),  # in the store, and in what its group gives to consumers
            ),
            ("UPDATE trajectories SET task = 'never_asked' WHERE rowid = 1", Verdict(lost=1, unexpected=1)),
        ],
    )
    def test_changed(self, change: str, found: Verdict, run: tuple[Path, Workload]) -> None:
        out, workload = run
        _execute(out, change)
        assert _judge(workload, out, list(workload.expected)) == found

    def test_a_run_that_was_not_finished(self, run: tuple[Path, Workload]) -> None:
        out, workload = run
        _execute(out, "UPDATE run SET state = 'running'")
        with pytest.raises(RunFailed, match="without being finished"):
            _judge(workload, out, [])


def _execute(out: Path, change: str) -> None:
    with closing(apsw.Connection(str(out / "run.sqlite"))) as connection:
        connection.execute(change)


class TestModelCalls:
    def test_what_a_kill_repeats(self) -> None:
        first, late = LoggedCall(10.0, "a", 0, 1), LoggedCall(12.9, "b", 0, 1)
        again = [LoggedCall(14.0, "a", 0, 1), LoggedCall(14.1, "b", 0, 1)]
        trial = Trial("chat", kills=[{"at": 13.0}])
        _count_calls(trial, [first, late, *again])
        assert trial.model_calls == 4
        assert trial.model_calls_repeated == 1, "the other one was answered less than 0.2 s before the kill"
        assert trial.repeated_after_s == pytest.approx([0.1, 3.0])
        assert not trial.clean

    def test_an_answer_to_a_process_that_was_killed_meanwhile(self) -> None:
        call = LoggedCall(13.02, "a", 0, 1, asked=12.9)
        trial = Trial("chat", kills=[{"at": 13.0}, {"at": 14.0}])
        _count_calls(trial, [call, call._replace(t=15.0, asked=14.9)])
        assert trial.model_calls_repeated == 0
        assert trial.repeated_after_s == pytest.approx([-0.02])

    def test_nothing_excuses_a_repeat_where_only_sandboxes_die(self) -> None:
        call = LoggedCall(10.0, "a", 0, 1)
        trial = Trial("chat", sandbox_kills=[{"at": 10.1}])
        _count_calls(trial, [call, call._replace(t=10.3)])
        assert trial.model_calls_repeated == 1


class TestLives:
    def test_a_process_that_outlives_its_orchestrator(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lives, "GRACE_S", 0.05)
        known = set(processes.children(os.getpid()))
        processes.adopt_orphans(adopt=True)
        try:
            subprocess.run(["sh", "-c", "sleep 61 >/dev/null 2>&1 & exit 0"], check=True)
            assert asyncio.run(lives._end_orphans(known)) == ["sleep 61"]
            assert asyncio.run(lives._end_orphans(known)) == []
        finally:
            processes.adopt_orphans(adopt=False)

    def test_a_life_that_ends_badly(self, tmp_path: Path) -> None:
        ward = Ward(tmp_path, tmp_path / "log")

        async def resume_nothing() -> None:
            async with ward.life(["resume", str(tmp_path / "nothing")]) as life:
                await life.finish()

        with pytest.raises(RunFailed, match=r"status 2:\s.*there is no run"):
            asyncio.run(resume_nothing())
        assert ward.left == []

    def test_a_life_that_is_left_is_ended(self, tmp_path: Path) -> None:
        async def leave() -> int:
            async with Ward(tmp_path, tmp_path / "log").life(["doctor"]) as life:
                assert not await life.last(0.0)
            return life.pid

        assert not Path(f"/proc/{asyncio.run(leave())}").exists()
