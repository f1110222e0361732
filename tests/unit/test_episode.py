"""One episode on a backend in memory, in virtual time: its end, budgets, policy, resume, cancellation."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from played import HEAD, KEY, Says, Stage, say, stage

from orchestrator import records
from orchestrator.errors import PolicyError, RunFailed, SandboxError, SandboxRefused
from orchestrator.records import EpisodeBuffer
from orchestrator.seeds import environment_seed, policy_seed
from orchestrator.testing import Die, Hang, MemoryCall, Refuse, Say, Slow
from orchestrator.types import (
    Decision,
    EpisodeKey,
    Failure,
    FailureKind,
    Generation,
    Outcome,
    StopReason,
    Trajectory,
)

if TYPE_CHECKING:
    from orchestrator.protocols import EpisodeContext
    from orchestrator.records import ConversationView
    from orchestrator.testing.script import Fault

pytestmark = pytest.mark.looptime


def summary(one: Trajectory) -> tuple[Outcome, StopReason, float | None, int]:
    return (one.outcome, one.stop_reason, one.reward, one.steps)


def kinds(buffer: bytes) -> str:
    """The records of a trajectory, a letter each."""
    start = records.read_header(buffer)[1]
    return "".join(chr(record.kind) for record in records.records(buffer, start))


class TestEnds:
    async def test_done(self) -> None:
        policy = Says("one", "two", "stop")
        async with stage(policy) as on:
            played = await on.play()
            assert summary(played) == (Outcome.COMPLETED, StopReason.DONE, 3.0, 3)
            assert kinds(played.buffer) == "OAOAOAOE"
            assert (played.key, played.attempt, played.incarnations, played.failure) == (KEY, 0, 1, None)
            assert not played.recovered
            assert on.idle()
        assert policy.asked == [(KEY, 0), (KEY, 1), (KEY, 2)]
        assert on.touched == [(KEY, 0, 1), (KEY, 0, 2), (KEY, 0, 3)], "each decision, before its step"

    async def test_its_seeds_and_its_number(self) -> None:
        key = EpisodeKey("memory_5", 2, 3)
        policy = Says("stop")
        async with stage(policy) as on:
            played = await on.episode(key, attempt=4).run()
            opening = orjson.loads(EpisodeBuffer.restore(played.buffer).history()[0][0].body)
            assert f"memory_5 seed {environment_seed(7, key)} turn 0" in opening["messages"][0]["content"]
            [context] = policy.contexts
            assert (context.key, context.attempt, context.seed) == (key, 4, policy_seed(7, key))
            assert (played.attempt, context.solution) == (4, None)

    async def test_model_calls_and_tokens_are_summed(self) -> None:
        cost = Generation("m", 10, 5, 0.1, "stop", {}, calls=2)

        def act(view: ConversationView) -> Decision:
            return Decision(say("stop" if view.turn == 2 else "on"), cost if view.turn else None)

        async with stage(Says(act=act)) as on:
            played = await on.play()
            assert (played.model_calls, played.prompt_tokens, played.completion_tokens) == (4, 20, 10)

    @pytest.mark.parametrize("op", ["step", "evaluate"])
    @pytest.mark.parametrize("kind", [FailureKind.ENVIRONMENT, FailureKind.BAD_REWARD])
    async def test_a_broken_environment_is_raised_as_it_is(self, op: str, kind: FailureKind) -> None:
        async with stage(Says("one", "stop"), lambda call: Refuse(kind, "any") if call.op == op else None) as on:
            with pytest.raises(SandboxRefused) as caught:
                await on.play()
            assert (caught.value.failure.kind, caught.value.failure.stage) == (kind, op)
            assert on.idle()

    async def test_an_unknown_task(self) -> None:
        async with stage(Says("one")) as on:
            with pytest.raises(SandboxRefused) as caught:
                await on.play(EpisodeKey("nothing", 0, 0))
            assert caught.value.failure.kind is FailureKind.UNKNOWN_TASK
            assert on.idle()

    async def test_no_sandbox_at_all(self) -> None:
        async with stage(Says("one"), lambda call: Die() if call.op == "create" else None) as on:
            with pytest.raises(RunFailed, match="no sandbox can be started"):
                await on.play()


class TestBudgets:
    async def test_turns(self) -> None:
        async with stage(Says(*["on"] * 9), max_turns=4) as on:
            assert summary(await on.play()) == (Outcome.TRUNCATED, StopReason.MAX_TURNS, 4.0, 4)

    async def test_done_with_the_last_turn_is_done(self) -> None:
        async with stage(Says("on", "stop"), max_turns=2) as on:
            assert summary(await on.play()) == (Outcome.COMPLETED, StopReason.DONE, 2.0, 2)

    async def test_time_while_the_policy_thinks(self) -> None:
        policy = Says(*["on"] * 9, think_s=10.0)
        async with stage(policy, time_budget_s=25.0) as on:
            played = await on.play()
            assert summary(played) == (Outcome.TRUNCATED, StopReason.TIME_BUDGET, 2.0, 2)
            assert asyncio.get_running_loop().time() == pytest.approx(25.0)
            assert len(policy.asked) == 3
            assert kinds(played.buffer) == "OAOAOE"

    async def test_time_during_a_step(self) -> None:
        async with stage(
            Says("quick", "slow", "never"),
            lambda call: Slow(4.0) if b"slow" in call.action else None,
            time_budget_s=2.0,
        ) as on:
            played = await on.play()
            assert summary(played) == (Outcome.TRUNCATED, StopReason.TIME_BUDGET, 1.0, 2)
            assert kinds(played.buffer) == "OAOAE", "the step's outcome is unknown"
            assert on.idle()

    async def test_time_is_not_used_up_by_waiting_for_a_sandbox(self) -> None:
        """A budget bounds the agent, so it is counted from the episode's start: what waits before is the run's."""
        async with stage(Says("stop"), time_budget_s=5.0) as on:
            await asyncio.sleep(60)
            assert (await on.play()).stop_reason is StopReason.DONE

    async def test_an_observation_over_the_cap(self) -> None:
        large = Refuse(FailureKind.ENVIRONMENT, "too_large")
        async with stage(Says("on", "large", "never"), lambda call: large if b"large" in call.action else None) as on:
            played = await on.play()
            assert summary(played) == (Outcome.TRUNCATED, StopReason.REPLY_TOO_LARGE, 1.0, 2)
            assert kinds(played.buffer) == "OAOAE"

    async def test_how_it_ended_is_not_forgotten_when_grading_loses_its_sandbox(self) -> None:
        def script(call: MemoryCall) -> Fault | None:
            if b"large" in call.action:
                return Refuse(FailureKind.ENVIRONMENT, "too_large")
            return Die() if (call.sandbox, call.op) == (1, "evaluate") else None

        policy = Says("on", "large", "never")
        async with stage(policy, script) as on:
            played = await on.play()
            assert summary(played) == (Outcome.TRUNCATED, StopReason.REPLY_TOO_LARGE, 1.0, 2)
            assert played.recovered
        assert len(policy.asked) == 2

    async def test_time_that_ran_out_stays_so_when_grading_loses_its_sandbox(self) -> None:
        def script(call: MemoryCall) -> Fault | None:
            return Die() if (call.sandbox, call.op) == (1, "evaluate") else None

        async with stage(Says(*["on"] * 9, think_s=10.0), script, time_budget_s=25.0) as on:
            assert summary(await on.play()) == (Outcome.TRUNCATED, StopReason.TIME_BUDGET, 2.0, 2)


class TestPolicy:
    @pytest.mark.parametrize(
        "junk",
        [None, "stop", b"stop", ("a", None), Decision("stop"), Decision(bytearray(b"{}")), 5],  # type: ignore[arg-type]
    )
    async def test_what_is_no_decision(self, junk: Any) -> None:
        async with stage(Says(act=lambda view: junk)) as on:
            with pytest.raises(PolicyError) as caught:
                await on.play()
            assert caught.value.failure.kind is FailureKind.POLICY
            assert "not a Decision" in caught.value.failure.message
            assert on.idle()

    @pytest.mark.parametrize("error", [ValueError("no"), KeyError("x"), TimeoutError(), AssertionError("never")])
    async def test_what_it_raises(self, error: Exception) -> None:
        def act(view: ConversationView) -> Decision:
            raise error

        async with stage(Says(act=act)) as on:
            with pytest.raises(PolicyError) as caught:
                await on.play()
            failure = caught.value.failure
            assert (failure.kind, failure.stage) == (FailureKind.POLICY, "act")
            assert type(error).__name__ in failure.message
            assert caught.value.__cause__ is error
            assert on.idle()

    async def test_its_own_typed_failure_passes_through(self) -> None:
        failure = Failure(FailureKind.MODEL_UNAVAILABLE, "act", "no answer")

        def act(view: ConversationView) -> Decision:
            raise PolicyError(failure)

        async with stage(Says(act=act)) as on:
            with pytest.raises(PolicyError) as caught:
                await on.play()
            assert caught.value.failure == failure

    async def test_a_cancellation_of_its_own_is_a_failure_and_nobody_elses(self) -> None:
        async def act() -> Decision:
            inner = asyncio.get_running_loop().create_future()
            inner.cancel()
            return Decision(await inner)

        async with stage(Says(act=lambda view: act())) as on:
            with pytest.raises(PolicyError) as caught:
                await on.play()
            assert caught.value.failure.kind is FailureKind.POLICY

    async def test_its_own_timeout_is_not_the_budgets(self) -> None:
        async def act() -> Decision:
            async with asyncio.timeout(1.0):
                await asyncio.sleep(2.0)
            raise AssertionError

        async with stage(Says(act=lambda view: act()), time_budget_s=100.0) as on:
            with pytest.raises(PolicyError) as caught:
                await on.play()
            assert "TimeoutError" in caught.value.failure.message

    async def test_one_that_cannot_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def start(ctx: EpisodeContext) -> Any:
            raise KeyError("no agent")

        policy = Says("stop")
        monkeypatch.setattr(policy, "start", start)
        async with stage(policy) as on:
            with pytest.raises(PolicyError) as caught:
                on.episode()
            assert (caught.value.failure.kind, caught.value.failure.stage) == (FailureKind.POLICY, "start")

    async def test_solutions_only_for_those_who_need_them(self) -> None:
        policy = Says("stop")
        policy.needs_solutions = True
        async with stage(policy) as on:
            episode = on.episode()
            [context] = policy.contexts
            assert context.solution is not None
            with pytest.raises(SandboxError, match="before the episode opened"):
                await context.solution()
            await episode.run()
            assert [orjson.loads(action)["content"] for action in await context.solution()][-1] == "stop"

    async def test_a_sandbox_lost_while_it_is_asked_for_a_solution_makes_no_suspect(self) -> None:
        async def act() -> Decision:
            asked = policy.contexts[0].solution
            assert asked is not None
            return Decision((await asked())[-1])

        policy = Says(act=lambda view: act())
        policy.needs_solutions = True
        async with stage(policy, lambda call: Die() if call == MemoryCall(1, "solution", KEY.task) else None) as on:
            played = await on.play()
            assert summary(played) == (Outcome.COMPLETED, StopReason.DONE, 1.0, 1)
            assert played.incarnations == 2
            assert on.backend.statistics().started == 2, "no quarantine was needed"


class TestResume:
    def history(self, *contents: str, unanswered: str | None = None) -> EpisodeBuffer:
        """What an earlier life recorded: the truth, for the same world is asked again."""

        async def live() -> bytes:
            async with stage(Says(*contents), max_turns=len(contents)) as on:
                return (await on.play()).buffer

        buffer = EpisodeBuffer.restore(asyncio.run(live()))
        if unanswered is not None:
            buffer.decide(Decision(say(unanswered)))
        return buffer

    @pytest.fixture
    def answered(self) -> EpisodeBuffer:
        return self.history("one", "two")

    @pytest.fixture
    def unanswered(self) -> EpisodeBuffer:
        return self.history("one", unanswered="two")

    async def test_decisions_are_not_asked_for_again(self, answered: EpisodeBuffer) -> None:
        policy = Says("one", "two", "stop")
        async with stage(policy) as on:
            played = await on.play(buffer=answered)
            assert summary(played) == (Outcome.COMPLETED, StopReason.DONE, 3.0, 3)
            assert (played.incarnations, played.recovered) == (2, True)
            assert kinds(played.buffer) == "OAOAOAOE"
        assert policy.asked == [(KEY, 2)]

    async def test_an_unanswered_action_is_run_once(self, unanswered: EpisodeBuffer) -> None:
        policy = Says("one", "two", "stop")
        async with stage(policy) as on:
            resumed = await on.play(buffer=unanswered)
            plain = await on.play()
            assert resumed.buffer == plain.buffer
        assert policy.asked[0] == (KEY, 2)

    async def test_an_end_that_was_recorded_is_only_graded(self) -> None:
        async with stage(Says("stop")) as on:
            buffer = EpisodeBuffer.restore((await on.play()).buffer)
            on.policy.asked.clear()
            assert summary(await on.play(buffer=buffer)) == (Outcome.COMPLETED, StopReason.DONE, 1.0, 1)
            assert on.policy.asked == []

    async def test_an_unanswered_action_over_the_cap(self, unanswered: EpisodeBuffer) -> None:
        large = Refuse(FailureKind.ENVIRONMENT, "too_large")
        async with stage(Says("one", "two"), lambda call: large if b"two" in call.action else None) as on:
            assert (await on.play(buffer=unanswered)).stop_reason is StopReason.REPLY_TOO_LARGE

    @pytest.mark.parametrize(("op", "turn"), [("open", 0), ("step", 0), ("step", 1)])
    async def test_another_world_is_a_divergence(self, answered: EpisodeBuffer, op: str, turn: int) -> None:
        def script(call: MemoryCall) -> Fault | None:
            return Say() if (call.op, call.turn) == (op, turn) else None

        async with stage(Says(), script) as on:
            with pytest.raises(SandboxError) as caught:
                await on.play(buffer=answered)
            assert caught.value.failure.kind is FailureKind.DIVERGED
            assert on.idle()


class TestCancellation:
    """Cancelled at any await, an episode leaves no session and no lease, and a buffer that can go on."""

    @staticmethod
    def script(call: MemoryCall) -> Fault | None:
        """A rich life: a loss with a suspect, a quarantine, a death there, a recovery."""
        return Die() if call.sandbox in {1, 2} and call.op == "step" and call.turn == 1 else None

    async def cut(self, turns: int) -> bool:
        """Whether there was something to cut after so many turns of the loop."""
        async with stage(Says("one", "two", "three", "stop"), self.script) as on:
            episode = on.episode()
            running = asyncio.create_task(episode.run())
            for _ in range(turns):
                await asyncio.sleep(0)
            cut = running.cancel()
            await asyncio.wait({running})
            assert running.cancelled() == cut
            await asyncio.sleep(1)
            self.check(on, episode.buffer, played=not cut)
            return cut

    def check(self, on: Stage, buffer: EpisodeBuffer, *, played: bool) -> None:
        assert on.idle()
        observations, actions = buffer.history()
        assert played or len(actions) - len(observations) in {-1, 0}
        assert EpisodeBuffer.restore(bytes(buffer.data)).history() == (observations, actions)

    async def test_at_every_turn_of_the_loop(self) -> None:
        turns = 0
        while await self.cut(turns):
            turns += 1
        assert turns > 20, "the episode that is cut short has that many turns"

    async def test_a_cancelled_episode_goes_on_where_it_was(self) -> None:
        async with stage(Says("one", "two", "three", "stop")) as on:
            whole = await on.play()
        for turns in range(0, 40, 3):
            policy = Says("one", "two", "three", "stop")
            async with stage(policy, self.script) as on:
                buffer = EpisodeBuffer(HEAD)
                first = asyncio.create_task(on.episode(buffer=buffer).run())
                for _ in range(turns):
                    await asyncio.sleep(0)
                if not first.cancel():
                    break
                await asyncio.wait({first})
                again = await on.play(buffer=EpisodeBuffer.restore(bytes(buffer.data)))
                assert again.buffer == whole.buffer
                assert len(policy.asked) == len(set(policy.asked)) == 4, "no decision is asked for twice"

    async def test_while_it_hangs(self) -> None:
        async with stage(Says("one"), lambda call: Hang() if call.op == "step" else None) as on:
            running = asyncio.create_task(on.play())
            await asyncio.sleep(1)
            assert not on.idle()
            running.cancel()
            await asyncio.wait({running})
            assert on.idle()
