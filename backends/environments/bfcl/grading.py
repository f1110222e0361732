"""Verdicts, by upstream's own checkers.

A grade is a function of the task and the recorded calls alone: it builds simulators of its own, replays answer and
truth turn by turn as upstream does, and leaves nothing behind. So it can be had at any moment, as often as wanted.
The reward is 1.0 or 0.0; the details name the first thing that is wrong.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

import orjson

from backends.environments.bfcl import data, upstream
from backends.environments.bfcl.world import Commons, Recorded, World
from backends.server.environment import Grade

if TYPE_CHECKING:
    from collections.abc import Sequence

    from backends.environments.bfcl.tasks import MultiTurnTask, SingleTurnTask

    Step = Sequence[Recorded]

_LONG_RESULT: Final = 1024
_MAX_MESSAGE: Final = 500
_UNFORESEEN: Final = (AttributeError, IndexError, KeyError, NotImplementedError, RecursionError, TypeError, ValueError)
"""What upstream's checker raises on answers of a shape that it did not foresee."""


def multi_turn(task: MultiTurnTask, turns: Sequence[Sequence[Step]]) -> Grade:
    """Grade the turns begun so far. Turns that are missing fail the task, as they do upstream.

    Details: `valid`, `error_type` and `error_message` where it is not, and `turns`: for each of the task's turns the
    number of calls made and how it was judged (`valid`, `not_checked` behind the first error or where the truth has no
    call, or the error's type).
    """
    verdicts = _judge_turns(task, turns)
    failure = next((verdict for verdict in verdicts if not verdict["valid"]), None)
    if failure is None and len(turns) < len(task.truth):
        failure = _invalid("multi_turn:force_terminated", f"{len(turns)} of {len(task.truth)} turns were played")
    judged = [_label(verdict) for verdict in verdicts]
    judged += ["not_checked"] * (len(task.truth) - len(judged))
    calls = [sum(len(step) for step in turn) for turn in turns]
    calls += [0] * (len(task.truth) - len(calls))
    info = [{"calls": count, "verdict": verdict} for count, verdict in zip(calls, judged, strict=True)]
    return _grade(failure, {"turns": info})


def _judge_turns(task: MultiTurnTask, turns: Sequence[Sequence[Step]]) -> list[dict[str, Any]]:
    """Upstream's verdict on each turn, up to and with the first that is invalid."""
    commons = Commons()
    model, truth = (
        World(task.simulators, task.configuration, long_context=task.long_context, commons=commons) for _ in range(2)
    )
    results: list[str] = []
    verdicts: list[dict[str, Any]] = []
    for index, (steps, expected) in enumerate(zip(turns, task.truth, strict=False)):
        results += [_comparable(model.replay(call)) for step in steps for call in step]
        wanted = [_comparable(truth.replay(call)) for call in expected]
        verdicts.append(_judge_turn(index, model, truth, results if any(steps) else None, wanted))
        if not verdicts[-1]["valid"]:
            break
    return verdicts


def _judge_turn(index: int, model: World, truth: World, results: list[str] | None, wanted: list[str]) -> dict[str, Any]:
    """One turn as upstream judges it; `results` are all results so far, None where the turn has no call."""
    if not wanted:
        return {"valid": True, "unchecked": True}
    if results is None:
        return _invalid("multi_turn:empty_turn_model_response", f"turn {index} has no call")
    try:
        verdict = upstream.state_checker(model.simulators, truth.simulators)
    except RecursionError:
        return _invalid("multi_turn:instance_state_mismatch", "the state contains itself and cannot be compared")
    return upstream.response_checker(results, wanted, index) if verdict["valid"] else verdict


def _comparable(result: str) -> str:
    """A result, or its digest where it is long: results are compared and kept for the whole grade."""
    return result if len(result) <= _LONG_RESULT else blake2b(result.encode("utf-8", "surrogatepass")).hexdigest()


def single_turn(task: SingleTurnTask, calls: Sequence[Recorded] | None) -> Grade:
    """Grade the one answer; None stands for none yet, or one that could not be read, which is wrong everywhere.

    Upstream counts an unreadable answer as right in the irrelevance categories; here it is wrong there too, or a
    policy would learn to write broken calls. Details: `valid`, `error_type`, `error_message`.
    """
    if calls is None:
        return _grade(_invalid("ast_decoder:decoder_failed", "there is no answer that can be read"), {})
    match task.category.removeprefix("live_"):
        case "irrelevance":
            wrong, kind, message = (
                bool(calls),
                "irrelevance_error:decoder_success",
                "a function is called, yet none fits",
            )
        case "relevance":
            wrong, kind, message = not calls, "relevance_error:decoder_failed", "no function is called, yet one fits"
        case _:
            verdict = _check_calls(task, calls)
            wrong, kind, message = not verdict["valid"], verdict.get("error_type", ""), _without_answer(verdict)
    return _grade(_invalid(kind, message) if wrong else None, {})


def agentic(task: str, answer: str | None) -> Grade:
    """Grade the text that answers a memory's question; None or an empty one is wrong.

    Details: `valid`, `error_type`, `error_message`.
    """
    if not answer:
        return _grade(_invalid("agentic:no_last_message", "there is no message that answers the question"), {})
    verdict = upstream.agentic_checker(answer, data.answer(task))
    return _grade(None if verdict["valid"] else verdict, {})


def _check_calls(task: SingleTurnTask, calls: Sequence[Recorded]) -> dict[str, Any]:
    decoded = [{call.name.replace(".", "_"): orjson.loads(call.arguments)} for call in calls]
    documents = data.entry(task.id)["function"]
    try:
        return upstream.ast_checker(documents, decoded, data.answer(task.id), task.category)
    except _UNFORESEEN as error:
        return {"valid": False, "error_type": "ast_checker:error", "error": [f"{type(error).__name__}: {error}"]}


def _without_answer(verdict: dict[str, Any]) -> str:
    """Upstream's first complaint, up to where it lists the possible answers."""
    first = next(iter(verdict.get("error", ())), "")
    return first.partition(" Expected one of ")[0] if isinstance(first, str) else ""


def _invalid(kind: str, message: str) -> dict[str, Any]:
    return {"valid": False, "error_type": kind, "error_message": message}


def _label(verdict: dict[str, Any]) -> str:
    if not verdict["valid"]:
        return str(verdict["error_type"])
    return "not_checked" if verdict.get("unchecked") else "valid"


def _grade(failure: dict[str, Any] | None, details: dict[str, Any]) -> Grade:
    if failure is None:
        return Grade(1.0, {"valid": True, **details})
    message = str(failure["error_message"])[:_MAX_MESSAGE]
    return Grade(0.0, {"valid": False, "error_type": failure["error_type"], "error_message": message, **details})
