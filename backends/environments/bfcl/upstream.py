"""The one door to `bfcl_eval`: all that this environment takes from upstream's code comes through here.

Upstream's modules also reach for vendors' SDKs, parsers and lock files, and make folders beside the package when
imported. Nothing used here needs any of that, so those modules get empty stand-ins before the first import (the index
that memories search by gets one that works, `ranking`): nothing is written, nothing heavy is loaded. Every import
happens at first use, which keeps the start of a sandbox short.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from backends.environments.bfcl.ranking import BM25Plus
from backends.server.environment import unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MODEL: Final = "rollout"
"""The model name that upstream's checkers are given: its names carry "_" where a function's name has "."."""

_STAND_INS: Final[dict[str, dict[str, Any]]] = {
    "filelock": {"FileLock": object},
    "overrides": {"final": lambda member: member},
    "rank_bm25": {"BM25Plus": BM25Plus},
    "tenacity": dict.fromkeys(
        ("retry", "retry_if_exception_message", "retry_if_exception_type", "wait_random_exponential")
    ),
    "bfcl_eval.constants.eval_config": {},
    "bfcl_eval.constants.model_config": {"MODEL_CONFIG_MAPPING": {MODEL: SimpleNamespace(underscore_to_dot=True)}},
    "bfcl_eval.model_handler.parser.java_parser": {"parse_java_function_call": None},
    "bfcl_eval.model_handler.parser.js_parser": {"parse_javascript_function_call": None},
}


@cache
def package() -> Path:
    """The folder of the installed package. Raises EnvironmentFault where it is not installed."""
    spec = importlib.util.find_spec("bfcl_eval")
    if spec is None or not spec.submodule_search_locations:
        raise unavailable("bfcl", "the package bfcl-eval in its own environment; run `rollout env install bfcl`")
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def _module(name: str) -> Any:
    package()
    for stand_in, attributes in _STAND_INS.items():
        if stand_in not in sys.modules:
            module = ModuleType(stand_in)
            vars(module).update(attributes)
            sys.modules[stand_in] = module
    return importlib.import_module(f"bfcl_eval.{name}")


def collections() -> Mapping[str, Sequence[str]]:
    """Upstream's sub-types: name -> categories, in upstream's order."""
    mapping: Mapping[str, Sequence[str]] = _module("constants.category_mapping").TEST_COLLECTION_MAPPING
    return mapping


def prompt_formats() -> int:
    """In how many prompt formats the category format_sensitivity asks each of its questions."""
    return len(_module("utils").get_all_format_sensitivity_configs())


def step_limit() -> int:
    """How many steps with calls a user's turn may take; one more ends the entry."""
    limit: int = _module("constants.default_prompts").MAXIMUM_STEP_LIMIT
    return limit


def functions_added_text() -> str:
    """What the user says when held-out functions appear."""
    text: str = _module("constants.default_prompts").DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC
    return text


def document_file(simulator: str) -> str:
    """The file name of a simulator's function documents."""
    name: str = _module("constants.executable_backend_config").MULTI_TURN_FUNC_DOC_FILE_MAPPING[simulator]
    return name


@cache
def simulator(name: str) -> type[Any]:
    """The class of a simulator, by its name in the data."""
    path: str = _module("constants.executable_backend_config").CLASS_FILE_PATH_MAPPING[name]
    found: type[Any] = getattr(_module(path.removeprefix("bfcl_eval.")), name)
    return found


def stateless(simulator: str) -> bool:
    """Whether a simulator takes no configuration: upstream says so, or it is a memory, which starts empty here."""
    return (
        simulator.startswith("MemoryAPI_")
        or simulator in _module("constants.executable_backend_config").STATELESS_CLASSES
    )


def extension(name: str) -> Mapping[str, Any]:
    """One of the module-level tables that a long context adds to a simulator's records."""
    path = "eval_checker.multi_turn_eval.func_source_code.long_context"
    table: Mapping[str, Any] = getattr(_module(path), name)
    return table


def openai_tools(task: str, documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Function documents as OpenAI tools, by upstream's own conversion. Changes `documents`: pass fresh ones.

    As upstream does for a model with function calls: a hint at the language is added to each description, Java and
    JavaScript parameters become strings (source literals), types become JSON Schema's, "." in names becomes "_".
    """
    entry = {"id": task, "function": documents}
    _module("utils").add_language_specific_hint_to_function_doc([entry])
    types = _module("constants.type_mappings").GORILLA_TO_OPENAPI
    style = _module("constants.enums").ModelStyle.OPENAI_COMPLETIONS
    tools: list[dict[str, Any]] = _module("model_handler.utils").convert_to_tool(documents, types, style)
    return tools


def state_checker(model: Mapping[str, Any], truth: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the public attributes of all simulators are equal; `valid`, `error_type`, `error_message`, `details`."""
    verdict: dict[str, Any] = _module("eval_checker.multi_turn_eval.multi_turn_checker").state_checker(model, truth)
    return verdict


def response_checker(model: Sequence[str], truth: Sequence[str], turn: int) -> dict[str, Any]:
    """Whether the results of the truth's calls are all among the model's so far."""
    check = _module("eval_checker.multi_turn_eval.multi_turn_checker").response_checker
    verdict: dict[str, Any] = check(model, truth, turn)
    return verdict


def with_answer_format(question: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A memory's question behind upstream's system message about the form of the answer."""
    entry: dict[str, Any] = {"id": "memory_kv_0", "question": [[dict(message) for message in question]]}
    _module("utils").process_agentic_test_case([entry])
    messages: list[dict[str, Any]] = entry["question"][0]
    return messages


def with_memory(
    messages: Sequence[Mapping[str, Any]], category: str, scenario: str, memory: Any
) -> list[dict[str, Any]]:
    """A conversation's first messages behind upstream's system prompt, which shows what a memory holds now."""
    copies = [dict(message) for message in messages]
    _module("model_handler.utils").add_memory_instruction_system_prompt([copies], category, scenario, memory)
    return copies


def agentic_checker(text: str, answers: Sequence[str]) -> dict[str, Any]:
    """Whether one of the answers stands in the text; `valid`, `error_type`, `error_message`."""
    check = _module("eval_checker.agentic_eval.agentic_checker").agentic_checker
    verdict: dict[str, Any] = check(text, answers)
    return verdict


def language(category: str) -> Any:
    """The language whose literals a single-turn category's arguments are."""
    languages = _module("constants.enums").Language
    return {"simple_java": languages.JAVA, "simple_javascript": languages.JAVASCRIPT}.get(category, languages.PYTHON)


def ast_checker(
    documents: Sequence[Mapping[str, Any]],
    calls: Sequence[Mapping[str, Mapping[str, Any]]],
    answers: Sequence[Mapping[str, Any]],
    category: str,
) -> dict[str, Any]:
    """Whether calls `{name: arguments}` are among the possible answers; `valid`, `error`, `error_type`."""
    check = _module("eval_checker.ast_eval.ast_checker").ast_checker
    verdict: dict[str, Any] = check(documents, calls, answers, language(category), category, MODEL)
    return verdict


def literal_converter(category: str) -> Callable[..., Any] | None:
    """`convert(source literal, type, nested type) -> value`; None where arguments are plain JSON values."""
    converters = "eval_checker.ast_eval.type_convertor"
    match category:
        case "simple_java":
            convert: Callable[..., Any] = _module(f"{converters}.java_type_converter").java_type_converter
            return convert
        case "simple_javascript":
            convert = _module(f"{converters}.js_type_converter").js_type_converter
            return convert
        case _:
            return None
