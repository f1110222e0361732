"""The service's pure parts: who may ask, what is admitted, boxes, how errors become statuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from orchestrator.errors import ActionKilled, RunFailed, SandboxError, SandboxRefused, UsageError
from orchestrator.service.boxes import BOX_IDLE_S, Boxes
from orchestrator.service.limits import ServiceLimits
from orchestrator.service.refusals import Refusal, refusal
from orchestrator.service.register import Register
from orchestrator.service.tenants import Admission, Place, Tenants
from orchestrator.types import Failure, FailureKind

if TYPE_CHECKING:
    from orchestrator.service.tenants import Tenant

TOKENS = {"one": "s3cret", "two": "öther"}


def failure(kind: FailureKind) -> Failure:
    return Failure(kind, "step", "words")


@pytest.mark.parametrize(
    ("header", "who"), [("Bearer s3cret", "one"), ("bearer  s3cret ", "one"), ("BEARER öther", "two")]
)
def test_who_holds_a_token(header: str, who: str) -> None:
    assert Tenants(TOKENS).identify(header).name == who


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "s3cret", "Basic s3cret", "Bearer s3cre", "Bearer \udcff"]
)
def test_who_holds_none(header: str | None) -> None:
    with pytest.raises(Refusal) as refused:
        Tenants(TOKENS).identify(header)
    assert refused.value.status == 401


def test_without_tokens_everybody_is_one_tenant_and_an_empty_token_is_none() -> None:
    tenants = Tenants({})
    assert tenants.identify(None) is tenants.identify("Bearer x")
    with pytest.raises(UsageError, match="empty"):
        Tenants({"one": " "})


@pytest.mark.parametrize(
    ("error", "status", "again"),
    [
        (Refusal(409, "taken"), 409, False),
        (ActionKilled(failure(FailureKind.SANDBOX_LOST)), 422, False),
        (SandboxRefused(failure(FailureKind.ENVIRONMENT), code="environment"), 500, False),
        (SandboxRefused(failure(FailureKind.BAD_REWARD), code="bad_reward"), 500, False),
        (SandboxRefused(failure(FailureKind.UNKNOWN_TASK), code="unknown_task"), 400, False),
        *((SandboxError(failure(kind)), 503, True) for kind in
          (FailureKind.SANDBOX_LOST, FailureKind.SANDBOX_HUNG, FailureKind.SANDBOX_START, FailureKind.PROTOCOL)),
        (SandboxError(failure(FailureKind.DIVERGED)), 500, False),
        (UsageError("wrong"), 400, False),
        (RunFailed("nothing starts"), 503, True),
        (TimeoutError(), 503, True),
    ],
)  # fmt: skip
def test_how_an_error_becomes_a_status(error: Exception, status: int, again: bool) -> None:
    told = refusal(error)
    assert (told.status, told.retry_after is not None) == (status, again)
    assert str(told)


def test_a_defect_of_the_service_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    told = refusal(ZeroDivisionError("secret words"))
    assert told.status == 500
    assert "secret words" not in str(told)
    assert "secret words" in caplog.text


def test_requests_under_way_are_bounded() -> None:
    admission = Admission(ServiceLimits(calls=1))
    with admission.call():
        with pytest.raises(Refusal) as refused, admission.call():
            pass
        assert (refused.value.status, refused.value.retry_after is not None) == (503, True)
    with admission.call():
        assert admission.statistics() == (0, 1, 1, 0)


def test_idle_boxes_make_room_and_others_are_kept() -> None:
    limits = ServiceLimits(boxes_per_token=2)
    boxes = Boxes(Register(Admission(limits), limits), limits)
    tenants = Tenants(TOKENS)
    one, two = tenants.identify("Bearer s3cret"), tenants.identify("Bearer öther")
    first, second = (boxes.take(one, "toy", {}, {}) for _ in range(2))
    with pytest.raises(Refusal) as refused:
        boxes.take(one, "toy", {}, {})
    assert refused.value.status == 429
    boxes.take(two, "toy", {}, {})  # the quota is each token's own
    for name in (first.name, "none"):
        with pytest.raises(Refusal, match="No container found"):
            boxes.find(two, name)
    boxes.release(two, first.name)  # nor does releasing it as somebody else do anything
    assert boxes.find(one, first.name) is first
    first.called -= BOX_IDLE_S + 1
    third = boxes.take(one, "toy", {}, {})
    assert boxes.of(one) == [second, third]


class Admitting(RuleBasedStateMachine):
    """Places taken, weighed and given back, some of them twice, against plain counts."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = ServiceLimits(instances=5, instances_per_token=3, record_bytes=200)
        self.admission = Admission(self.limits)
        tenants = Tenants(TOKENS)
        self.tenants = [tenants.identify(f"Bearer {token}") for token in TOKENS.values()]
        self.held: list[tuple[Tenant, Place]] = []
        self.given: list[Place] = []
        self.weights: dict[Place, int] = {}

    @rule(number=st.integers(0, 1))
    def take(self, number: int) -> None:
        tenant = self.tenants[number]
        mine = sum(holder is tenant for holder, _ in self.held)
        status = 503 if self.admission.draining else 429 if mine == 3 else 503 if len(self.held) == 5 else None
        if status is None:
            self.held.append((tenant, self.admission.instance(tenant)))
            return
        with pytest.raises(Refusal) as refused:
            self.admission.instance(tenant)
        assert (refused.value.status, refused.value.retry_after is not None) == (status, True)

    @rule(number=st.integers(0, 4))
    def give_back(self, number: int) -> None:
        if number < len(self.held):
            place = self.held.pop(number)[1]
            place.give_back()
            self.weights.pop(place, None)
            self.given.append(place)

    @rule(number=st.integers(0, 4), size=st.integers(0, 100))
    def weigh(self, number: int, size: int) -> None:
        if number < len(self.held):
            self.held[number][1].weigh(size)
            self.weights[self.held[number][1]] = size

    @rule()
    def step(self) -> None:
        if sum(self.weights.values()) < self.limits.record_bytes:
            self.admission.step()
            return
        with pytest.raises(Refusal) as refused:
            self.admission.step()
        assert (refused.value.status, refused.value.retry_after is not None) == (503, True)

    @rule()
    def give_back_again(self) -> None:
        for place in self.given:
            place.give_back()
            place.weigh(1000)

    @rule(draining=st.booleans())
    def drain(self, draining: bool) -> None:
        self.admission.draining = draining

    @invariant()
    def counts_are_right(self) -> None:
        assert self.admission.statistics().instances == len(self.held)
        assert self.admission.statistics().record_bytes == sum(self.weights.values())
        for tenant in self.tenants:
            assert tenant.instances == sum(holder is tenant for holder, _ in self.held)


Admitting.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAdmitting = Admitting.TestCase
