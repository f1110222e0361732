"""The scheduler against a model of a run: random events in any order, resumed from any point, checked after each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator.planning import Plan
from orchestrator.retry import RetryPolicy
from orchestrator.scheduler import (
    SLACK,
    Command,
    Drain,
    Ended,
    Event,
    Failed,
    Finished,
    Lag,
    Launch,
    Record,
    Scheduler,
    SetAside,
    Stored,
    Tick,
    WakeAt,
)
from orchestrator.types import (
    REWARDED,
    EpisodeKey,
    Failure,
    FailureKind,
    GroupRelease,
    Outcome,
    StopReason,
    Trajectory,
)

RETRY = RetryPolicy(max_tries=3, first_delay_s=1.0, max_delay_s=8.0)
LOST = Failure(FailureKind.SANDBOX_LOST, "step", "lost")
DIVERGED = Failure(FailureKind.DIVERGED, "replay", "diverged")
BROKEN = Failure(FailureKind.ENVIRONMENT, "step", "broken")


def trajectory(
    key: EpisodeKey,
    attempt: int = 0,
    outcome: Outcome = Outcome.COMPLETED,
    reward: float | None = 1.0,
    failure: Failure | None = None,
) -> Trajectory:
    return Trajectory(key, attempt, outcome, StopReason.DONE, reward, 1, b"", failure=failure)


def rewarded(one: Trajectory) -> bool:
    return one.outcome in REWARDED and one.reward is not None


@dataclass
class Model:
    """What may happen next, and all that has happened: written without looking at the scheduler's own state."""

    plan: Plan
    limit: int
    max_unacked: int | None
    stored: set[EpisodeKey]
    rewarded_before: dict[EpisodeKey, bool]
    attempts: dict[EpisodeKey, int]
    now: float = 0.0
    running: dict[EpisodeKey, int] = field(default_factory=dict)
    tries: Counter[EpisodeKey] = field(default_factory=Counter)
    paused: dict[EpisodeKey, float] = field(default_factory=dict)
    expected: dict[EpisodeKey, tuple[int, bool]] = field(default_factory=dict)
    recorded: dict[EpisodeKey, Trajectory] = field(default_factory=dict)
    unstored: list[EpisodeKey] = field(default_factory=list)
    released: Counter[tuple[str, int]] = field(default_factory=Counter)
    poisoned: set[str] = field(default_factory=set)
    draining: bool = False
    unacked: int = 0
    released_since: int = 0
    last_of_group: set[EpisodeKey] = field(default_factory=set)
    finished: bool = False

    def __post_init__(self) -> None:
        self.keys = [EpisodeKey(s.task, s.group, n) for s in self.plan.specs() for n in range(s.size)]

    def waiting(self) -> list[EpisodeKey]:
        """Keys that could start now."""
        taken = self.stored | self.recorded.keys() | self.running.keys()
        return [key for key in self.keys if key not in taken and self.paused.get(key, self.now) <= self.now]

    @property
    def lagging(self) -> bool:
        on_their_way = sum(key in self.last_of_group for key in self.unstored)
        behind = self.unacked + self.released_since + on_their_way
        return self.max_unacked is not None and behind >= self.max_unacked

    def store(self, count: int) -> Stored:
        keys, self.unstored = self.unstored[:count], self.unstored[count:]
        self.stored |= set(keys)
        releases = sum(key in self.last_of_group for key in keys)
        self.released_since += releases
        return Stored(keys, releases)

    def look(self, unacked: int) -> Lag:
        self.unacked, self.released_since = unacked, 0
        return Lag(unacked)

    def admits(self) -> bool:
        return not self.draining and not self.lagging and len(self.unstored) < self.limit + SLACK


class SchedulerMachine(RuleBasedStateMachine):
    """Plays the engine: carries every command out, feeds set-asides back at once."""

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        tasks = [f"t{n}" for n in range(data.draw(st.integers(1, 3), "tasks"))]
        plan = Plan(tasks, data.draw(st.integers(1, 6), "groups"), data.draw(st.integers(1, 3), "size"))
        keys = [EpisodeKey(s.task, s.group, n) for s in plan.specs() for n in range(s.size)]
        stored = data.draw(st.sets(st.sampled_from(keys)), "stored")
        in_flight = data.draw(st.dictionaries(st.sampled_from(keys), st.integers(0, 3)), "attempts")
        before = {key: data.draw(st.booleans(), "rewarded") for key in sorted(stored)}
        self.model = Model(
            plan,
            limit=data.draw(st.integers(1, 5), "limit"),
            max_unacked=data.draw(st.none() | st.integers(1, 3), "max_unacked"),
            stored=stored,
            rewarded_before=before,
            attempts={key: attempt for key, attempt in in_flight.items() if key not in stored},
        )
        model = self.model
        whole = {(s.task, s.group) for s in plan.specs()} - {(k.task, k.group) for k in keys if k not in stored}
        self.scheduler = Scheduler(
            plan,
            model.limit,
            max_unacked=model.max_unacked,
            retry=RETRY,
            stored=frozenset(stored),
            attempts=dict(in_flight),  # a journal may still hold keys that were stored meanwhile
            open_samples=[(key, before[key]) for key in sorted(stored) if (key.task, key.group) not in whole],
        )
        model.expected = {key: (attempt, False) for key, attempt in model.attempts.items()}
        self.feed(Tick())

    def feed(self, event: Event) -> None:
        events = [event]
        while events:
            commands = self.scheduler.handle(events.pop(0), self.model.now)
            events.extend(answer for answer in map(self.carry_out, commands) if answer is not None)
            self.scheduler.check()

    def carry_out(self, command: Command) -> Event | None:
        model = self.model
        assert not model.finished, f"{command} after Finished"
        match command:
            case Launch(key, attempt, fresh):
                self.start(key)
                assert (attempt, fresh) == model.expected.get(key, (0, True))
                assert key.task not in model.poisoned
            case SetAside(key, attempt, outcome, failure):
                if key not in model.running:  # set aside instead of started
                    self.start(key)
                    assert key.task in model.poisoned
                    assert outcome is Outcome.POISONED
                assert outcome not in REWARDED
                return Ended(trajectory(key, attempt, outcome, None, failure))
            case Record(one, release):
                self.record(one, release)
            case WakeAt(time):
                assert time > model.now
            case Finished(complete):
                assert not model.running
                assert not model.unstored
                assert complete == (model.stored >= set(model.keys))
                assert complete or model.draining
                model.finished = True
        return None

    def start(self, key: EpisodeKey) -> None:
        model = self.model
        assert key in model.waiting(), f"{key} may not start"
        assert model.admits()
        model.paused.pop(key, None)
        model.running[key] = model.expected.get(key, (0, True))[0]
        model.tries[key] += 1
        assert len(model.running) <= model.limit

    def record(self, one: Trajectory, release: GroupRelease | None) -> None:
        model, key = self.model, one.key
        assert key in model.running
        assert key not in model.recorded, "a key ends in one record"
        del model.running[key]
        model.recorded[key] = one
        model.unstored.append(key)
        if one.outcome is Outcome.POISONED:
            model.poisoned.add(key.task)
        places = [EpisodeKey(key.task, key.group, sample) for sample in range(model.plan.size)]
        whole = all(place in model.recorded or place in model.rewarded_before for place in places)
        if not whole:
            assert release is None
            return
        good = [
            rewarded(model.recorded[place]) if place in model.recorded else model.rewarded_before[place]
            for place in places
        ]
        assert release == GroupRelease(key.task, key.group, model.plan.size, partial=not all(good))
        model.released[key.task, key.group] += 1
        model.last_of_group.add(key)
        assert model.released[key.task, key.group] == 1, "a group is released once"

    @precondition(lambda self: self.model.running)
    @rule(data=st.data(), kind=st.sampled_from(["good", "good", "cut", "dropped", "poisoned"]))
    def end(self, data: st.DataObject, kind: str) -> None:
        key = data.draw(st.sampled_from(sorted(self.model.running)))
        one = trajectory(key, self.model.running[key])
        match kind:
            case "cut":
                one = replace(one, outcome=Outcome.TRUNCATED, reward=0.0)
            case "dropped":
                one = replace(one, outcome=Outcome.TRUNCATED, reward=None)
            case "poisoned":
                one = replace(one, outcome=Outcome.POISONED, reward=None, failure=LOST)
            case _:
                pass
        self.feed(Ended(one))

    @precondition(lambda self: self.model.running)
    @rule(data=st.data(), failure=st.sampled_from([LOST, DIVERGED, BROKEN]))
    def fail(self, data: st.DataObject, failure: Failure) -> None:
        model = self.model
        key = data.draw(st.sampled_from(sorted(model.running)))
        if failure is not BROKEN and model.tries[key] < RETRY.max_tries:
            attempt, fresh = model.running.pop(key), failure is DIVERGED
            model.expected[key] = (attempt + fresh, fresh)
            model.paused[key] = model.now + RETRY.first_delay_s * 2 ** (model.tries[key] - 1)
        self.feed(Failed(key, failure))
        assert (key in model.recorded) == (key not in model.paused and key not in model.running)

    @precondition(lambda self: self.model.unstored)
    @rule(data=st.data())
    def store(self, data: st.DataObject) -> None:
        model = self.model
        self.feed(model.store(data.draw(st.integers(1, len(model.unstored)))))

    @rule(unacked=st.integers(0, 4))
    def lag(self, unacked: int) -> None:
        self.feed(self.model.look(unacked))

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 4.0]))
    def wait(self, seconds: float) -> None:
        self.model.now += seconds
        self.feed(Tick())

    @rule()
    def drain(self) -> None:
        assume(len(self.model.recorded) > 2)  # else most runs would end at once
        self.model.draining = True
        self.feed(Drain())

    @invariant()
    def nothing_that_may_run_waits(self) -> None:
        model = self.model
        if model.admits():
            assert len(model.running) == model.limit or not model.waiting()

    @invariant()
    def counts_add_up(self) -> None:
        model, counts = self.model, self.scheduler.statistics()
        assert counts.total == len(model.keys)
        assert (counts.running, counts.unstored) == (len(model.running), len(model.unstored))
        assert counts.stored == len(model.stored)
        assert counts.waiting + counts.paused == len(model.keys) - len(
            model.running.keys() | model.stored | model.recorded.keys()
        )

    def teardown(self) -> None:
        """Whatever happened, the run comes to its end."""
        if not hasattr(self, "model"):
            return
        model = self.model
        for _ in range(10 * len(model.keys)):
            for key in sorted(model.running):
                self.feed(Ended(trajectory(key, model.running[key])))
            if model.unstored:
                self.feed(model.store(len(model.unstored)))
            self.feed(model.look(0))
            if model.finished:
                break
            model.now += RETRY.max_delay_s
            self.feed(Tick())
        assert model.finished
        if not model.draining:
            assert model.stored == set(model.keys)
            assert model.recorded.keys().isdisjoint(model.rewarded_before)
            assert set(model.released) == {(key.task, key.group) for key in model.recorded}


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase


def key(sample: int, task: str = "t0", group: int = 0) -> EpisodeKey:
    return EpisodeKey(task, group, sample)


def launched(commands: list[Command]) -> list[EpisodeKey]:
    return [command.key for command in commands if isinstance(command, Launch)]


def test_attempts_in_flight_go_first_and_keep_their_number() -> None:
    scheduler = Scheduler(Plan(["t0"], 1, 4), 2, attempts={key(3): 2})
    assert scheduler.handle(Tick(), 0.0) == [Launch(key(3), 2, fresh=False), Launch(key(0), 0, fresh=True)]


def test_groups_are_dealt_over_the_tasks_round_after_round() -> None:
    specs = [(s.index, s.task, s.group, s.size) for s in Plan(["a", "b"], 5, 2).specs()]
    assert specs == [(0, "a", 0, 2), (1, "b", 0, 2), (2, "a", 1, 2), (3, "b", 1, 2), (4, "a", 2, 2)]


def test_ended_episodes_that_are_not_durable_are_bounded() -> None:
    scheduler = Scheduler(Plan(["t0"], 2000, 1), 4)
    started = launched(scheduler.handle(Tick(), 0.0))
    ended = 0
    while started:
        ended += 1
        started += launched(scheduler.handle(Ended(trajectory(started.pop())), 0.0))
    assert ended == 4 + SLACK + 3  # those that still ran when the bound was reached
    waiting = sorted(scheduler.unstored)
    assert launched(scheduler.handle(Stored(waiting[:3]), 0.0)) == []
    assert len(launched(scheduler.handle(Stored(waiting[3:4]), 0.0))) == 4


def test_a_poisoned_task_is_set_aside_and_the_others_go_on() -> None:
    scheduler = Scheduler(Plan(["bad", "good"], 6, 1), 1)
    [first] = launched(scheduler.handle(Tick(), 0.0))
    assert scheduler.poisoned("bad") is None
    poisoned = trajectory(first, 0, Outcome.POISONED, None, LOST)
    assert launched(scheduler.handle(Ended(poisoned), 0.0)) == [EpisodeKey("good", 0, 0)]
    assert scheduler.poisoned("bad") == LOST
    [record, aside] = scheduler.handle(Ended(trajectory(EpisodeKey("good", 0, 0))), 0.0)
    assert isinstance(record, Record)
    assert aside == SetAside(EpisodeKey("bad", 1, 0), 0, Outcome.POISONED, LOST)


def test_tries_are_counted_and_pauses_double_until_it_is_given_up() -> None:
    scheduler = Scheduler(Plan(["t0"], 1, 1), 1, retry=RETRY)
    scheduler.handle(Tick(), 0.0)
    assert scheduler.handle(Failed(key(0), LOST), 10.0) == [WakeAt(11.0)]
    assert scheduler.handle(Tick(), 10.9) == []
    assert scheduler.handle(Tick(), 11.0) == [Launch(key(0), 0, fresh=False)]
    assert scheduler.handle(Failed(key(0), DIVERGED), 20.0) == [WakeAt(22.0)]
    assert scheduler.handle(Tick(), 22.0) == [Launch(key(0), 1, fresh=True)]
    assert scheduler.handle(Failed(key(0), LOST), 30.0) == [SetAside(key(0), 1, Outcome.INFRA_FAILED, LOST)]
    scheduler.check()


def test_ending_what_does_not_run_is_an_error() -> None:
    scheduler = Scheduler(Plan(["t0"], 1, 1), 1)
    scheduler.handle(Tick(), 0.0)
    scheduler.handle(Ended(trajectory(key(0))), 0.0)
    with pytest.raises(ValueError, match="t0/0/0 ended, but is not running"):
        scheduler.handle(Ended(trajectory(key(0))), 0.0)


def test_check_sees_a_broken_state() -> None:
    scheduler = Scheduler(Plan(["t0"], 3, 1), 1)
    scheduler.handle(Tick(), 0.0)
    scheduler.unstored.add(key(0))
    with pytest.raises(AssertionError, match="two places"):
        scheduler.check()
    scheduler.unstored.clear()
    scheduler.limit = 0
    with pytest.raises(AssertionError, match="the limit is 0"):
        scheduler.check()
