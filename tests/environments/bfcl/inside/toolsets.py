"""Look at the tool set of every task: names and types that an OpenAI endpoint accepts."""

import json
import re
import sys

from playing import ENVIRONMENT

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
TYPES = {"object", "array", "string", "integer", "number", "boolean"}


def schemas(schema):
    yield schema
    for child in schema.get("properties", {}).values():
        yield from schemas(child)
    if "items" in schema:
        yield from schemas(schema["items"])


bad_names, bad_schemas, sets, without = set(), set(), 0, 0
for task in ENVIRONMENT.tasks("all").ids:
    session, reply = ENVIRONMENT.open(task, 0, {})
    if reply.toolset is None:
        without += 1
        continue
    sets += 1
    for tool in json.loads(reply.toolset.body):
        function = tool["function"]
        if not NAME.fullmatch(function["name"]):
            bad_names.add(function["name"])
        if not all(schema.get("type") in TYPES for schema in schemas(function["parameters"])):
            bad_schemas.add(task)
json.dump(
    {"sets": sets, "without": without, "bad_names": sorted(bad_names), "bad_schemas": sorted(bad_schemas)}, sys.stdout
)
