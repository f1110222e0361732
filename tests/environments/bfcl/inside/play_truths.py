"""Play every multi-turn solution, 200 episodes interleaved; print rewards, steps and a digest of all observations."""

import json
import re
import sys
from collections import Counter
from hashlib import blake2b

from playing import ENVIRONMENT

digest = blake2b(digest_size=16)
rewards: Counter[float] = Counter()
early = unequal = steps = 0
longest_turn = 0
waiting = iter(ENVIRONMENT.tasks("multi_turn").ids)
live = []
results: dict[str, list[str]] = {}


def admit() -> bool:
    task = next(waiting, None)
    if task is None:
        return False
    session, opening = ENVIRONMENT.open(task, 0, {})
    digest.update(opening.body)
    live.append((task, session, iter(ENVIRONMENT.solution(task))))
    results[task] = []
    return True


while len(live) < 200 and admit():
    pass
while live:
    for episode in list(live):
        task, session, actions = episode
        action = next(actions)
        reply = session.step(action)
        steps += 1
        digest.update(reply.body)
        messages = json.loads(reply.body)["messages"]
        results[task] += [message["content"] for message in messages if message["role"] == "tool"]
        if not reply.done:
            early += reply.reward != 0.0
            continue
        assert next(actions, None) is None
        rewards[reply.reward] += 1
        unequal += session.evaluate({}).reward != reply.reward
        live.remove(episode)
        admit()

for task in ENVIRONMENT.tasks("multi_turn").ids:
    run = longest = 0
    for action in ENVIRONMENT.solution(task):
        run = run + 1 if re.search(rb'"tool_calls"', action) else 0
        longest = max(longest, run)
    longest_turn = max(longest_turn, longest)

json.dump(
    {
        "rewards": rewards,
        "steps": steps,
        "rewarded_early": early,
        "evaluate_differs": unequal,
        "longest_turn": longest_turn,
        "digest": digest.hexdigest(),
        "results": {task: blake2b("\0".join(texts).encode()).hexdigest() for task, texts in results.items()},
        "calls": sum(map(len, results.values())),
        "longest_result": max(len(text) for texts in results.values() for text in texts),
    },
    sys.stdout,
)
