"""Memory episodes by upstream's own inference loop and scorer alone, with nothing of the project. Argument: a folder.

A handler stands in for the model: it says what was played, and keeps what it is shown. The folder is where the package
`rank_bm25` and its numpy are installed. Upstream's results, and the snapshots that it keeps a memory in between the
conversations, go into a temporary folder. Reads `[[task, actions]]`, prints `[shown, verdict]` for each, and the tools.
"""

# ruff: noqa: N802, N815 - the names of the methods are upstream's

import contextlib
import copy
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

FOLDER = tempfile.TemporaryDirectory()
os.environ["BFCL_PROJECT_ROOT"] = FOLDER.name
sys.path.append(sys.argv[1])

JAVA, JAVASCRIPT = "parse_java_function_call", "parse_javascript_function_call"
WAITING = ("retry", "retry_if_exception_message", "retry_if_exception_type", "wait_random_exponential")
for name, attributes in {
    "filelock": {"FileLock": lambda _: contextlib.nullcontext()},
    "overrides": {"final": lambda member: member, "override": lambda member: member},
    "tenacity": dict.fromkeys(WAITING),
    "dotenv": {"load_dotenv": None},
    "tqdm": {"tqdm": None},
    "pandas": {},
    "bfcl_eval.constants.model_config": {"MODEL_CONFIG_MAPPING": {}},
    "bfcl_eval.model_handler.parser.java_parser": {JAVA: None},
    "bfcl_eval.model_handler.parser.js_parser": {JAVASCRIPT: None},
}.items():
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(attributes)

from bfcl_eval import utils  # noqa: E402 - behind the stand-ins
from bfcl_eval.constants.enums import ModelStyle  # noqa: E402
from bfcl_eval.constants.type_mappings import GORILLA_TO_OPENAPI  # noqa: E402
from bfcl_eval.eval_checker.eval_runner import _evaluate_single_agentic_entry  # noqa: E402
from bfcl_eval.model_handler.base_handler import BaseHandler  # noqa: E402
from bfcl_eval.model_handler.utils import convert_to_function_call, convert_to_tool  # noqa: E402

CATEGORIES = ("memory_kv", "memory_rec_sum")
ENTRIES = {entry["id"]: entry for name in CATEGORIES for entry in utils.load_dataset_entry(name)}
TRUTHS = {
    name: dict(zip((i for i in ENTRIES if i.startswith(f"{name}_") and "prereq" not in i), truths, strict=True))
    for name in CATEGORIES
    for truths in [[entry["ground_truth"] for entry in utils.load_ground_truth_entry(name)]]
}


class Played(BaseHandler):
    """Says the actions in their order."""

    def __init__(self, number, actions):
        super().__init__(f"played_{number}", 0.0, "played", True)
        self.model_style = ModelStyle.OPENAI_COMPLETIONS
        self.actions = iter(actions)
        self.shown = []
        self.tools = None

    def _pre_query_processing_FC(self, inference_data, _):
        return {**inference_data, "new": []}

    def _compile_tools(self, inference_data, entry):
        self.tools = convert_to_tool(copy.deepcopy(entry["function"]), GORILLA_TO_OPENAPI, self.model_style)
        return inference_data

    def _add(self, inference_data, messages):
        inference_data["new"] += [[message["role"], message["content"]] for message in messages]
        return inference_data

    add_first_turn_message_FC = _add_next_turn_user_message_FC = _add

    def _query_FC(self, inference_data):
        self.shown.append(inference_data["new"])
        inference_data["new"] = []
        return next(self.actions), 0.0

    def _parse_query_response_FC(self, action):
        calls = [entry["function"] for entry in action.get("tool_calls", ())]
        responses = [{call["name"]: call["arguments"]} for call in calls] or action["content"]
        return {"model_responses": responses, "input_token": 0, "output_token": 0}

    def _add_assistant_message_FC(self, inference_data, _):
        return inference_data

    def _add_execution_results_FC(self, inference_data, results, _):
        return self._add(inference_data, [{"role": "tool", "content": result} for result in results])

    def decode_execute(self, result, has_tool_call_tag):
        return convert_to_function_call(result) if isinstance(result, list) else self._refuse(result)

    def _refuse(self, result):
        raise ValueError(result)


def play(number, task, actions):
    category, entry = task.rpartition("_")[0], ENTRIES[task]
    chain = [copy.deepcopy(ENTRIES[name]) for name in [*entry["depends_on"], task]]
    utils.populate_initial_settings_for_memory_test_cases(chain, Path(FOLDER.name) / str(number))
    handler = Played(number, actions)
    for part in chain:
        result, _ = handler.inference(part, False, True)
    assert next(handler.actions, None) is None, f"{task}: upstream's episode is shorter"
    verdict = _evaluate_single_agentic_entry(
        handler, task, result, TRUTHS[category][task], chain[-1], "played", category
    )
    return [handler.shown, [verdict["valid"], verdict.get("error", {}).get("error_type")]], {category: handler.tools}


told, toolsets = [], {}
with FOLDER, contextlib.redirect_stdout(io.StringIO()):
    for number, (task, actions) in enumerate(json.load(sys.stdin)):
        episode, tools = play(number, task, actions)
        told.append(episode)
        toolsets |= tools
json.dump({"episodes": told, "toolsets": toolsets}, sys.stdout)
