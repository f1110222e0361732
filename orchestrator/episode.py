"""One episode: lease, open, act and step until it ends, evaluate; by replay again when its sandbox is lost.

Owns one attempt: its buffer, its agent, its session. Always true: a decision is in the buffer before its step is sent;
an observation is appended once; a replayed observation must equal the recorded one byte for byte; a step runs at most
once an incarnation; the session is closed and the lease released however the episode ends.

Blame: a call that was unanswered when its sandbox died is a suspect. The suspect is replayed alone in quarantine; only
a death there while that very call is in flight counts, and two such deaths are proof (one could be somebody's kill -9).
Then it was the agent's doing, or, at the opening, the task is poisoned.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from orchestrator.errors import RolloutError, SandboxError, SandboxLost, SandboxRefused, policy_failure
from orchestrator.events import EpisodeRecovering
from orchestrator.protocols import EpisodeContext
from orchestrator.records import ConversationView, EpisodeBuffer, parse_observation
from orchestrator.seeds import environment_seed, policy_seed
from orchestrator.types import (
    Decision,
    EpisodeSpec,
    Evaluation,
    Failure,
    FailureKind,
    OnAgentKill,
    Outcome,
    StopReason,
    Trajectory,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from orchestrator.events import Listener
    from orchestrator.pool import Pool
    from orchestrator.protocols import Policy, Sandbox, Session
    from orchestrator.types import EpisodeKey, Observation

MAX_LOSSES: Final = 12
"""Lost sandboxes of one try after which the retry policy is asked."""
PROOFS: Final = 2
"""Deaths alone in quarantine, with the suspect's call in flight, that prove its guilt."""
_TOO_LARGE: Final = "too_large"


@dataclass(frozen=True, slots=True)
class EpisodeSettings:
    """What all episodes of a run share. Times in seconds."""

    run_seed: int
    header: bytes
    deterministic: bool
    max_turns: int
    step_timeout_s: float
    time_budget_s: float | None
    on_agent_kill: OnAgentKill
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EpisodeServices:
    """What all episodes of a run use. `touch` tells the step journal that a buffer has grown; `poisoned` says why a
    task is set aside; `toolsets` holds the run's tool sets by digest and `absorb` adds a sandbox's."""

    pool: Pool
    policy: Policy
    emit: Listener
    touch: Callable[[EpisodeKey, int, EpisodeBuffer], None]
    poisoned: Callable[[str], Failure | None]
    toolsets: Mapping[str, bytes]
    absorb: Callable[[Sandbox], None]


class Episode:
    """One attempt of one episode. `buffer` is where it stands; keep it to go on after a failed try."""

    __slots__ = (
        "_accused", "_agent", "_deadline", "_incarnations", "_losses", "_sandbox", "_services", "_settings", "_spec",
        "_started", "_stop", "_view", "attempt", "buffer", "key",
    )  # fmt: skip

    def __init__(
        self,
        key: EpisodeKey,
        attempt: int,
        buffer: EpisodeBuffer,
        settings: EpisodeSettings,
        services: EpisodeServices,
    ) -> None:
        self.key = key
        self.attempt = attempt
        self.buffer = buffer
        self._settings = settings
        self._services = services
        seed = environment_seed(settings.run_seed, key)
        self._spec = EpisodeSpec(key.task, seed, settings.step_timeout_s, settings.options)
        self._view = ConversationView(buffer, services.toolsets)
        solution = self._solution if services.policy.needs_solutions else None
        context = EpisodeContext(key, attempt, policy_seed(settings.run_seed, key), solution)
        try:
            self._agent = services.policy.start(context)
        except RolloutError:
            raise
        except Exception as error:
            raise policy_failure(error, "start") from error
        self._sandbox: Sandbox | None = None
        self._accused = ""
        """The call in flight whose death in quarantine would count: open, step, evaluate; empty at other times."""
        self._stop: StopReason | None = None
        """Why the playing ended, once it has; a later incarnation only grades."""
        self._losses = 0
        self._incarnations = 0 if buffer.last is None else 1  # a history was made in an earlier incarnation
        self._started = time.time()
        budget = settings.time_budget_s
        self._deadline = None if budget is None else asyncio.get_running_loop().time() + budget

    async def run(self) -> Trajectory:
        """Play the episode to its end, through lost sandboxes.

        Raises SandboxError or PolicyError, with the failure that the retry policy is to judge. Cancelled: the session
        is closed; the buffer keeps what was decided.
        """
        while True:
            try:
                return await self._live()
            except SandboxLost as lost:
                self._count(lost)
                if lost.suspect and (verdict := await self._examine(lost.failure)) is not None:
                    return verdict

    async def _live(self) -> Trajectory:
        """One incarnation: from a lease to the end of the episode."""
        lease = await self._services.pool.lease()
        session: Session | None = None
        try:
            session = await self._open(lease.sandbox)
            await self._rebuild(session)
            if self._stop is None:
                self._stop = await (self._turns(session) if self._deadline is None else self._turns_in_time(session))
            return await self._grade(session, self._stop)
        finally:
            if session is not None:
                session.close()
            lease.release()

    async def _open(self, sandbox: Sandbox) -> Session:
        """Open a session; the first observation is recorded, or compared with the recorded one."""
        self._sandbox = sandbox
        self._incarnations += 1
        buffer = self.buffer
        self._accused = "open" if buffer.last is None else ""
        session, observation = await sandbox.open(self._spec)
        self._accused = ""
        try:
            self._services.absorb(sandbox)
            if buffer.last is None:
                buffer.observe(observation)
            else:
                self._compare(buffer.history()[0][:1], [observation])
        except BaseException:
            session.close()
            raise
        return session

    async def _rebuild(self, session: Session) -> None:
        """Replay what is recorded, then run the action that was left unanswered."""
        buffer = self.buffer
        if buffer.turn == 0:
            return
        observations, actions = buffer.history()
        answered = len(observations) - 1
        self._compare(observations[1:], await session.replay(actions[:answered]))
        if len(actions) > answered:
            self._accused = "step"
            try:
                buffer.observe(await session.step(actions[-1]))
            except SandboxRefused as refused:
                self._stop = _cut_short(refused)
            self._accused = ""

    async def _turns_in_time(self, session: Session) -> StopReason:
        """The same under the episode's time budget."""
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._turns(session)
        except TimeoutError:
            return StopReason.TIME_BUDGET

    async def _turns(self, session: Session) -> StopReason:
        """Act and step until something ends the episode. The hot loop: no task, no timer, no parsing here."""
        buffer, view, touch = self.buffer, self._view, self._services.touch
        key, attempt, max_turns = self.key, self.attempt, self._settings.max_turns
        while True:
            last = buffer.last
            if last is not None and last.done:
                return StopReason.DONE
            if buffer.turn >= max_turns:
                return StopReason.MAX_TURNS
            try:
                decision = await self._agent.act(view)
                if type(decision) is not Decision or type(decision.action) is not bytes:
                    raise TypeError(f"act returned {decision!r:.100}, not a Decision")
                buffer.decide(decision)
            except SandboxLost as lost:  # asked for its solution: no action of this episode was in flight
                raise SandboxLost(lost.failure, suspect=False) from lost
            except RolloutError:
                raise
            except asyncio.CancelledError as error:
                if _being_cancelled():
                    raise
                raise policy_failure(error, "act") from error  # the policy's own: nobody cancelled this episode
            except Exception as error:
                if _being_cancelled():  # the policy's own word for a cancellation that was meant for it
                    raise asyncio.CancelledError from error
                raise policy_failure(error, "act") from error
            touch(key, attempt, buffer)  # decisions must not be lost; an observation after them is replayed if it is
            try:
                buffer.observe(await session.step(decision.action))
            except SandboxRefused as refused:
                return _cut_short(refused)

    async def _grade(self, session: Session, stop: StopReason) -> Trajectory:
        if self.buffer.last is not None:
            parse_observation(
                self.buffer.last.body
            )  # perhaps nobody has looked at it: no reward for what is unreadable
        evaluation = await session.evaluate()
        outcome = Outcome.COMPLETED if stop is StopReason.DONE else Outcome.TRUNCATED
        return self._trajectory(outcome, stop, evaluation)

    async def _examine(self, lost: Failure) -> Trajectory | None:
        """Try the suspect alone. None: it is innocent, and its unanswered call has its answer where it was a step."""
        deaths = Counter[str]()
        while True:
            if self.buffer.last is None and (failure := self._services.poisoned(self.key.task)) is not None:
                return self._without_reward(Outcome.POISONED, StopReason.FAILURE, failure)
            try:
                async with self._services.pool.quarantine() as sandbox:
                    return await self._try(sandbox, lost.stage)
            except SandboxLost as again:
                self._count(again)
                accused = self._accused if again.suspect else ""
                deaths[accused] += 1
                if accused and deaths[accused] == PROOFS:
                    return await self._proven(accused, again.failure)

    async def _proven(self, accused: str, lost: Failure) -> Trajectory:
        if accused == "open":
            failure = Failure(lost.kind, "open", f"opening the task killed its sandbox again: {lost.message}")
            return self._without_reward(Outcome.POISONED, StopReason.FAILURE, failure)
        return await self._agent_killed(accused, lost)

    async def _try(self, sandbox: Sandbox, stage: str) -> Trajectory | None:
        session = await self._open(sandbox)
        try:
            await self._rebuild(session)
            if stage != "evaluate":
                return None
            self._accused = "evaluate"
            return await self._grade(session, self._stop or StopReason.DONE)
        finally:
            session.close()

    async def _agent_killed(self, accused: str, lost: Failure) -> Trajectory:
        """The agent's own action ended its sandbox, proven: the reward is what `on_agent_kill` says."""
        failure = Failure(
            lost.kind, accused, f"the agent's action ended its sandbox, {PROOFS} times alone: {lost.message}"
        )
        stop = StopReason.AGENT_KILLED_ENV
        match self._settings.on_agent_kill:
            case OnAgentKill.ZERO:
                return self._trajectory(Outcome.TRUNCATED, stop, Evaluation(0.0), failure)
            case OnAgentKill.DROP:
                return self._without_reward(Outcome.TRUNCATED, stop, failure)
            case OnAgentKill.GRADE:
                if accused == "evaluate":  # grading itself is what dies
                    return self._trajectory(Outcome.TRUNCATED, stop, Evaluation(0.0), failure)
                return self._trajectory(Outcome.TRUNCATED, stop, await self._grade_before(), failure)

    async def _grade_before(self) -> Evaluation:
        """The grade of the state before the last action."""
        while True:
            lease = await self._services.pool.lease()
            try:
                session = await self._open(lease.sandbox)
                try:
                    observations, actions = self.buffer.history()
                    self._compare(observations[1:], await session.replay(actions[: len(observations) - 1]))
                    return await session.evaluate()
                finally:
                    session.close()
            except SandboxLost as lost:
                self._count(lost)
            finally:
                lease.release()

    def _count(self, lost: SandboxLost) -> None:
        """Count a loss; raises when the episode cannot be rebuilt, or has lost too many."""
        self._losses += 1
        emit = self._services.emit
        emit(EpisodeRecovering(self.key, self.attempt, lost.failure, lost.suspect))
        if self._losses > MAX_LOSSES:
            raise SandboxError(lost.failure) from lost
        if not self._settings.deterministic and self.buffer.last is not None:
            message = f"the sandbox was lost ({lost.failure.message}) and the environment cannot be replayed"
            raise SandboxError(Failure(FailureKind.NOT_DETERMINISTIC, lost.failure.stage, message)) from lost

    def _compare(self, recorded: Sequence[Observation], replayed: Sequence[Observation]) -> None:
        for number, (old, new) in enumerate(zip(recorded, replayed, strict=True)):
            if old != new:
                message = f"replayed observation {number} differs: {new.body[:80]!r}, recorded {old.body[:80]!r}"
                raise SandboxError(Failure(FailureKind.DIVERGED, "replay", message))

    async def _solution(self) -> Sequence[bytes]:
        if self._sandbox is None:
            raise SandboxError(Failure(FailureKind.POLICY, "act", "a solution was asked for before the episode opened"))
        return await self._sandbox.solution(self.key.task)

    def _without_reward(self, outcome: Outcome, stop: StopReason, failure: Failure) -> Trajectory:
        return self._trajectory(outcome, stop, None, failure)

    def _trajectory(
        self, outcome: Outcome, stop: StopReason, evaluation: Evaluation | None, failure: Failure | None = None
    ) -> Trajectory:
        buffer = self.buffer
        if evaluation is not None:
            buffer.grade(evaluation)
        return Trajectory(
            key=self.key,
            attempt=self.attempt,
            outcome=outcome,
            stop_reason=stop,
            reward=None if evaluation is None else evaluation.reward,
            steps=buffer.turn,
            buffer=bytes(buffer.data),
            incarnations=self._incarnations,
            model_calls=buffer.model_calls,
            prompt_tokens=buffer.tokens_in,
            completion_tokens=buffer.tokens_out,
            failure=failure,
            details=b"{}" if evaluation is None else evaluation.details,
            started=self._started,
            finished=time.time(),
        )


def _cut_short(refused: SandboxRefused) -> StopReason:
    """An answer over the size cap ends the playing; any other refusal is raised."""
    if refused.code != _TOO_LARGE:
        raise refused
    return StopReason.REPLY_TOO_LARGE


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
