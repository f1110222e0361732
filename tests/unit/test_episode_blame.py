"""Who is to blame when a sandbox dies: suspects are tried alone, two deaths there with the call in flight are proof."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from played import CALL_LIMIT_S, KEY, Says, say, stage

from orchestrator.episode import MAX_LOSSES, PROOFS
from orchestrator.errors import SandboxError
from orchestrator.events import EpisodeRecovering
from orchestrator.testing import Die, Gone, Hang, MemoryCall, Refuse, Say, Slow
from orchestrator.types import (
    REWARDED,
    Decision,
    EpisodeKey,
    Failure,
    FailureKind,
    OnAgentKill,
    Outcome,
    StopReason,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from orchestrator.records import ConversationView, EpisodeBuffer
    from orchestrator.testing.script import Fault, Script

pytestmark = pytest.mark.looptime

KILLED = StopReason.AGENT_KILLED_ENV
BOOM = ("one", "two", "boom", "stop")


def dies(on: Callable[[MemoryCall], bool], times: int) -> Script:
    """A fault at the first so many calls of a kind."""
    seen = Counter[str]()

    def script(call: MemoryCall) -> Fault | None:
        if on(call) and seen["deaths"] < times:
            seen["deaths"] += 1
            return Die()
        return None

    return script


def booms(call: MemoryCall) -> bool:
    return b"boom" in call.action


class TestProof:
    async def test_a_killer_is_proven_by_two_deaths_alone(self) -> None:
        policy = Says(*BOOM)
        async with stage(policy, dies(booms, 99)) as on:
            played = await on.play()
            assert (played.outcome, played.stop_reason, played.reward) == (Outcome.TRUNCATED, KILLED, 0.0)
            assert played.failure is not None
            assert played.failure.stage == "step"
            assert "2 times alone" in played.failure.message
            assert played.incarnations == 1 + PROOFS
            assert played.steps == 3
            recovering = [event for event in on.events if isinstance(event, EpisodeRecovering)]
            assert [event.suspect for event in recovering] == [True] * 3
        assert len(policy.asked) == 3, "no decision is asked for again"

    @pytest.mark.parametrize("deaths", range(1, 1 + PROOFS))
    async def test_fewer_deaths_prove_nothing(self, deaths: int) -> None:
        policy = Says(*BOOM)
        async with stage(policy, dies(booms, deaths)) as on:
            played = await on.play()
            assert (played.outcome, played.reward, played.failure) == (Outcome.COMPLETED, 4.0, None)
            assert played.recovered
        assert len(policy.asked) == 4

    async def test_a_hang_is_proven_likewise(self) -> None:
        async with stage(Says(*BOOM), lambda call: Hang() if booms(call) else None) as on:
            played = await on.play()
            assert (played.stop_reason, played.reward) == (KILLED, 0.0)
            assert played.failure is not None
            assert played.failure.kind is FailureKind.SANDBOX_HUNG
            assert asyncio.get_running_loop().time() == pytest.approx(3 * CALL_LIMIT_S, abs=1.0)

    @pytest.mark.parametrize("turn", [0, 1])
    async def test_a_death_in_quarantine_during_the_replay_before_it_does_not_count(self, turn: int) -> None:
        """Somebody kills quarantine sandboxes again and again, never while the suspect's call is in flight."""
        killed = Counter[int]()

        def script(call: MemoryCall) -> Fault | None:
            if call.sandbox == 1 and booms(call):
                return Die()
            if call.sandbox > 1 and call.op == "step" and call.turn == turn and sum(killed.values()) < 6:
                killed[call.sandbox] += 1
                return Die()
            return None

        async with stage(Says(*BOOM), script) as on:
            played = await on.play()
            assert (played.outcome, played.reward, played.failure) == (Outcome.COMPLETED, 4.0, None)
        assert sum(killed.values()) == 6

    async def test_a_death_in_quarantine_before_the_call_was_sent_does_not_count(self) -> None:
        def script(call: MemoryCall) -> Fault | None:
            if not booms(call):
                return None
            return Die() if call.sandbox == 1 else Gone() if call.sandbox < 6 else None

        async with stage(Says(*BOOM), script) as on:
            played = await on.play()
            assert (played.outcome, played.reward, played.failure) == (Outcome.COMPLETED, 4.0, None)

    async def test_what_is_proven_is_the_call_that_died_alone_not_the_one_that_raised_suspicion(self) -> None:
        """An episode with a history is opened again; a death there makes it a suspect, and then its action kills."""

        def script(call: MemoryCall) -> Fault | None:
            if booms(call):
                return Gone() if call.sandbox == 1 else Die()
            return Die() if (call.sandbox, call.op) == (2, "open") else None

        async with stage(Says(*BOOM), script) as on:
            played = await on.play()
            assert (played.outcome, played.stop_reason, played.reward) == (Outcome.TRUNCATED, KILLED, 0.0)
            assert played.failure is not None
            assert played.failure.stage == "step"

    async def test_a_death_of_each_of_two_calls_proves_nothing(self) -> None:
        """The time is up during a step, and grading dies; alone, the step dies once, and then grading once."""
        calls = Counter[str]()

        def script(call: MemoryCall) -> Fault | None:
            calls[call.op] += 1
            if call.op == "step":
                return {1: Slow(4.0), 2: Die()}.get(calls["step"])
            return Die() if call.op == "evaluate" and calls["evaluate"] <= 2 else None

        async with stage(Says("one", "stop"), script, time_budget_s=2.0) as on:
            played = await on.play()
            assert (played.stop_reason, played.failure) == (StopReason.TIME_BUDGET, None)
            assert calls["evaluate"] > 2

    async def test_a_death_while_the_policy_thinks_makes_no_suspect(self) -> None:
        policy = Says("one", "two", "stop", think_s=1.0)
        async with stage(policy) as on:
            playing = asyncio.create_task(on.play())
            await asyncio.sleep(1.5)
            [sandbox] = on.pool.sandboxes()
            sandbox.condemn(Failure(FailureKind.SANDBOX_LOST, "call", "kill -9"))
            played = await playing
            assert (played.outcome, played.reward, played.incarnations) == (Outcome.COMPLETED, 3.0, 2)
            assert on.backend.statistics().started == 2, "the place's next sandbox, and no quarantine"
            [event] = [event for event in on.events if isinstance(event, EpisodeRecovering)]
            assert not event.suspect


class TestInnocence:
    async def test_those_who_die_beside_a_killer_are_never_blamed(self) -> None:
        """Sixty episodes on one sandbox, all with a call in flight when one of them kills it, thrice."""
        keys = [EpisodeKey(f"memory_{number}", 0, 0) for number in range(60)]
        killers = {keys[7].task, keys[31].task, keys[55].task}

        def script(call: MemoryCall) -> Fault | None:
            if call.op == "step" and call.task in killers and call.turn == 2:
                return Die()
            return Slow(0.5) if call.op == "step" else None

        policy = Says("one", "two", "three", "stop")
        async with stage(policy, script, sandboxes=2) as on:
            played = await on.play_all(keys)
            assert on.idle()
        for key, one in played.items():
            if key.task in killers:
                assert (one.outcome, one.stop_reason, one.reward) == (Outcome.TRUNCATED, KILLED, 0.0)
            else:
                assert (one.outcome, one.reward, one.failure) == (Outcome.COMPLETED, 4.0, None)
        assert len(policy.asked) == len(set(policy.asked)), "no decision is asked for twice"
        assert any(one.recovered for key, one in played.items() if key.task not in killers)

    async def test_recovered_episodes_are_equal_to_undisturbed_ones(self) -> None:
        keys = [EpisodeKey(f"memory_{number}", 0, 0) for number in range(20)]
        policy = Says("one", "two", "three", "stop")
        async with stage(policy, sandboxes=2) as on:
            plain = await on.play_all(keys)

        def script(call: MemoryCall) -> Fault | None:
            if call.sandbox < 3 and call.op == "step" and call.turn == 1 and call.task.endswith("3"):
                return Die()
            return Slow(0.01 * call.turn) if call.op == "step" else None

        async with stage(policy, script, sandboxes=2) as on:
            disturbed = await on.play_all(keys)
        assert {key: one.buffer for key, one in disturbed.items()} == {key: one.buffer for key, one in plain.items()}

    async def test_a_step_runs_at_most_once_an_incarnation(self) -> None:
        calls = Counter[tuple[int, str, int, bytes]]()
        base = dies(booms, 2)

        def script(call: MemoryCall) -> Fault | None:
            if call.op == "step":
                calls[call.sandbox, call.task, call.turn, call.action] += 1
            return base(call)

        async with stage(Says(*BOOM), script, sandboxes=1) as on:
            await on.play()
        # A sandbox holds one incarnation, but the last quarantine's, which is followed by another on its place's own.
        assert max(calls.values()) == 1


class TestPoison:
    async def test_an_opening_that_kills_twice_alone(self) -> None:
        key = EpisodeKey("memory_3", 0, 0)
        async with stage(Says("stop"), dies(lambda call: (call.op, call.task) == ("open", "memory_3"), 99)) as on:
            played = await on.play(key)
            assert (played.outcome, played.stop_reason, played.reward) == (Outcome.POISONED, StopReason.FAILURE, None)
            assert played.failure is not None
            assert played.failure.stage == "open"
            assert (played.steps, played.incarnations) == (0, 1 + PROOFS)
            assert played.outcome not in REWARDED
            assert (await on.play(KEY)).outcome is Outcome.COMPLETED

    @pytest.mark.parametrize("deaths", range(1, 1 + PROOFS))
    async def test_fewer_deaths_do_not_poison(self, deaths: int) -> None:
        async with stage(Says("stop"), dies(lambda call: call.op == "open", deaths)) as on:
            assert (await on.play()).outcome is Outcome.COMPLETED

    async def test_a_suspect_opening_of_a_task_already_set_aside_is_not_tried(self) -> None:
        async with stage(Says("stop"), dies(lambda call: call.op == "open", 99)) as on:
            on.poisoned[KEY.task] = why = Failure(FailureKind.SANDBOX_LOST, "open", "proven by another")
            played = await on.play()
            assert (played.outcome, played.failure) == (Outcome.POISONED, why)
            assert played.incarnations == 1

    async def test_opening_again_kills_nobody_who_has_opened_before(self) -> None:
        """An episode that lives has opened: deaths while it opens elsewhere are not its doing."""
        openings = Counter[str]()

        def script(call: MemoryCall) -> Fault | None:
            openings[call.op] += 1
            if booms(call) and call.sandbox == 1:
                return Die()
            return Die() if call.op == "open" and 1 < openings["open"] < 7 else None

        async with stage(Says(*BOOM), script) as on:
            played = await on.play()
            assert (played.outcome, played.reward) == (Outcome.COMPLETED, 4.0)


class TestOnAgentKill:
    @pytest.mark.parametrize(
        ("choice", "reward", "letters"),
        [(OnAgentKill.ZERO, 0.0, "OAOAOAE"), (OnAgentKill.GRADE, 2.0, "OAOAOAE"), (OnAgentKill.DROP, None, "OAOAOA")],
    )
    async def test_an_action_that_kills(self, choice: OnAgentKill, reward: float | None, letters: str) -> None:
        from test_episode import kinds

        async with stage(Says(*BOOM), dies(booms, 99), on_agent_kill=choice) as on:
            played = await on.play()
            assert (played.outcome, played.stop_reason, played.reward) == (Outcome.TRUNCATED, KILLED, reward)
            assert kinds(played.buffer) == letters
            assert on.idle()

    @pytest.mark.parametrize(
        ("choice", "reward"), [(OnAgentKill.ZERO, 0.0), (OnAgentKill.GRADE, 0.0), (OnAgentKill.DROP, None)]
    )
    async def test_a_state_whose_grading_kills(self, choice: OnAgentKill, reward: float | None) -> None:
        async with stage(Says("stop"), dies(lambda call: call.op == "evaluate", 99), on_agent_kill=choice) as on:
            played = await on.play()
            assert (played.outcome, played.stop_reason, played.reward) == (Outcome.TRUNCATED, KILLED, reward)
            assert played.failure is not None
            assert played.failure.stage == "evaluate"

    @pytest.mark.parametrize("deaths", range(1, 1 + PROOFS))
    async def test_grading_that_dies_and_then_works(self, deaths: int) -> None:
        async with stage(Says("stop"), dies(lambda call: call.op == "evaluate", deaths)) as on:
            played = await on.play()
            assert (played.outcome, played.reward, played.failure) == (Outcome.COMPLETED, 1.0, None)

    async def test_grading_the_state_before_survives_further_losses(self) -> None:
        def script(call: MemoryCall) -> Fault | None:
            return Die() if booms(call) or (call.op == "evaluate" and call.sandbox < 6) else None

        async with stage(Says(*BOOM), script, on_agent_kill=OnAgentKill.GRADE) as on:
            assert (await on.play()).reward == 2.0


class TestLimits:
    async def test_a_replay_that_differs_is_a_divergence(self) -> None:
        def script(call: MemoryCall) -> Fault | None:
            if call.sandbox == 1 and booms(call):
                return Die()
            return Say() if call.sandbox > 1 and call.op == "step" and call.turn == 1 else None

        async with stage(Says(*BOOM), script) as on:
            with pytest.raises(SandboxError) as caught:
                await on.play()
            assert caught.value.failure.kind is FailureKind.DIVERGED
            assert "replayed observation 1 differs" in caught.value.failure.message
            assert on.idle()

    @pytest.mark.parametrize("field", ["reward", "done"])
    async def test_rewards_and_ends_are_compared_too(self, field: str) -> None:
        """The body is the same, what came with it is not."""

        def act(view: ConversationView) -> Decision:
            if view.turn == 2:
                self.falsify(episode.buffer, field)
            return Decision(say(BOOM[view.turn]))

        async with stage(Says(act=act), dies(booms, 1)) as on:
            episode = on.episode()
            with pytest.raises(SandboxError) as caught:
                await episode.run()
            assert caught.value.failure.kind is FailureKind.DIVERGED

    @staticmethod
    def falsify(buffer: EpisodeBuffer, field: str) -> None:
        """Change what the first observation came with: its end flag is the byte before its body."""
        body = buffer.data.index(buffer.history()[0][0].body)
        buffer.data[body - (1 if field == "done" else 2)] ^= 1

    async def test_an_environment_that_cannot_be_replayed(self) -> None:
        async with stage(Says(*BOOM), dies(booms, 1), deterministic=False) as on:
            with pytest.raises(SandboxError) as caught:
                await on.play()
            assert caught.value.failure.kind is FailureKind.NOT_DETERMINISTIC
            assert on.idle()

    async def test_an_opening_can_be_repeated_in_any_environment(self) -> None:
        async with stage(Says("stop"), dies(lambda call: call.op == "open", 1), deterministic=False) as on:
            assert (await on.play()).outcome is Outcome.COMPLETED

    async def test_too_many_losses_are_for_the_retry_policy(self) -> None:
        async with stage(Says("one", "stop"), lambda call: Gone() if call.turn == 1 else None) as on:
            with pytest.raises(SandboxError) as caught:
                await on.play()
            assert caught.value.failure.kind is FailureKind.SANDBOX_LOST
            recovering = [event for event in on.events if isinstance(event, EpisodeRecovering)]
            assert len(recovering) == MAX_LOSSES + 1
            assert on.idle()

    async def test_an_environment_that_breaks_in_quarantine_is_told(self) -> None:
        def script(call: MemoryCall) -> Fault | None:
            if not booms(call):
                return None
            return Die() if call.sandbox == 1 else Refuse(FailureKind.ENVIRONMENT, "environment")

        async with stage(Says(*BOOM), script) as on:
            with pytest.raises(SandboxError) as caught:
                await on.play()
            assert caught.value.failure.kind is FailureKind.ENVIRONMENT
            assert on.idle()

    async def test_a_history_is_kept_for_the_next_try(self) -> None:
        policy = Says("one", "two", "stop")
        deaths = Counter[str]()

        def script(call: MemoryCall) -> Fault | None:
            deaths["seen"] += call.turn == 2
            return Gone() if call.turn == 2 and deaths["seen"] <= MAX_LOSSES + 1 else None

        async with stage(policy, script) as on:
            first = on.episode()
            with pytest.raises(SandboxError):
                await first.run()
            played = await on.play(buffer=first.buffer)
            assert (played.outcome, played.reward, played.recovered) == (Outcome.COMPLETED, 3.0, True)
        assert [turn for _, turn in policy.asked] == [0, 1, 2], "no decision is asked for again"
        assert first.buffer.history()[1] == [say("one"), say("two"), say("stop")]
