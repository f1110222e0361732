"""Play every memory solution, all episodes of a category at once, while each writes its own id into its memory.

Prints the rewards, a digest of all observations, and how many were shown another one's id (`leaked`).
"""

import json
import sys
from collections import Counter
from hashlib import blake2b

from playing import ENVIRONMENT, tool_calls

WRITING = {"memory_kv": ("core_memory_add", "key", "value"), "memory_rec_sum": ("memory_append", None, "text")}
digest = blake2b(digest_size=16)
rewards: Counter[float] = Counter()
early = leaked = 0

for category, (function, key, value) in WRITING.items():
    tasks = ENVIRONMENT.tasks(category).ids
    live = {}
    for task in tasks:
        session, opening = ENVIRONMENT.open(task, 0, {})
        digest.update(opening.body)
        arguments = {value: f"[{task}]"} | ({key: "mine"} if key else {})
        session.step(tool_calls([{"name": function, "arguments": arguments}]))
        live[task] = session, iter(ENVIRONMENT.solution(task))
    while live:
        for task, (session, actions) in list(live.items()):
            reply = session.step(next(actions))
            digest.update(reply.body)
            shown = reply.body.decode()
            anew = b'"new_conversation":true' in reply.body
            leaked += shown.count(f"[{category}") != (f"[{task}]" in shown) or anew != (f"[{task}]" in shown)
            if not reply.done:
                early += reply.reward != 0.0
                continue
            assert next(actions, None) is None
            rewards[session.evaluate({}).reward] += reply.reward == 1.0
            del live[task]

told = {"rewards": rewards, "rewarded_early": early, "leaked": leaked, "digest": digest.hexdigest()}
json.dump(told, sys.stdout)
