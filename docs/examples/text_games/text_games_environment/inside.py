"""Gymnasium's text games as tasks for agents: a frozen lake, a taxi, a cliff. An example of isolation `shared`.

Tasks are `lake_N` (a lake of its own for each N), `taxi_N` (another fare) and `cliff_0`. Every turn the agent calls the
tool `move` with a direction and sees the map. A step's reward is Gymnasium's own; the grade is 1.0 once the goal is
reached, else 0.0. The option `slippery` (false) makes the lakes slippery: where the ice leads follows from the seed.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

import gymnasium
import orjson
from gymnasium.envs.toy_text.frozen_lake import generate_random_map

from backends.server.environment import (
    EnvironmentFault,
    Grade,
    Reply,
    Tasks,
    Toolset,
    observation,
    unknown_split,
    unknown_task,
)
from backends.server.wire import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

LAKES: Final = 60
FARES: Final = 39
TASKS: Final = (*(f"lake_{n}" for n in range(LAKES)), *(f"taxi_{n}" for n in range(FARES)), "cliff_0")
SIDE: Final = 6
"""Squares along one side of a lake."""


class Kind(NamedTuple):
    """One of the games: how it is made, what its actions are called in Gymnasium's order, how a state looks."""

    make: Callable[[int, bool], gymnasium.Env[int, int]]
    moves: tuple[str, ...]
    rules: str
    shown: Callable[[gymnasium.Env[int, int], int], str]

    @property
    def tools(self) -> list[object]:
        """The tool `move`."""
        direction = {"type": "string", "enum": list(self.moves)}
        parameters = {"type": "object", "properties": {"direction": direction}, "required": ["direction"]}
        return [{"type": "function", "function": {"name": "move", "description": "Act.", "parameters": parameters}}]


def lake(number: int, slippery: bool) -> gymnasium.Env[int, int]:
    """A lake that can be crossed."""
    squares = generate_random_map(size=SIDE, seed=number)
    return gymnasium.make("FrozenLake-v1", desc=squares, is_slippery=slippery, disable_env_checker=True)


def taxi(number: int, slippery: bool) -> gymnasium.Env[int, int]:
    """The one town; the fare follows from the seed of `reset`."""
    return gymnasium.make("Taxi-v4", disable_env_checker=True)


def cliff(number: int, slippery: bool) -> gymnasium.Env[int, int]:
    """The one cliff, with a time limit that Gymnasium does not set."""
    return gymnasium.make("CliffWalking-v1", max_episode_steps=200, disable_env_checker=True)


def lake_shown(game: gymnasium.Env[int, int], state: int) -> str:
    """F ice, H hole, G goal, @ the walker."""
    rows = [[square.decode() for square in row] for row in game.unwrapped.desc]
    return marked(rows, *divmod(state, SIDE))


def taxi_shown(game: gymnasium.Env[int, int], state: int) -> str:
    """The town with @ for the taxi, and the fare."""
    row, column, passenger, destination = game.unwrapped.decode(state)
    town = [[square.decode() for square in line] for line in game.unwrapped.desc]
    at = "at " + "RGYB"[passenger] if passenger < len("RGYB") else "in the taxi"
    return f"{marked(town, row + 1, 2 * column + 1)}\nPassenger {at}, to {'RGYB'[destination]}."


def cliff_shown(game: gymnasium.Env[int, int], state: int) -> str:
    """. ground, C cliff, G goal, @ the walker."""
    rows, columns = game.unwrapped.shape
    squares = [["."] * columns for _ in range(rows - 1)] + [["."] + ["C"] * (columns - 2) + ["G"]]
    return marked(squares, *divmod(state, columns))


def marked(rows: list[list[str]], row: int, column: int) -> str:
    """A map with @ at one of its squares."""
    rows[row][column] = "@"
    return "\n".join("".join(line) for line in rows)


WALK: Final = "You are @. Reach G. "
KINDS: Final = {
    "lake": Kind(lake, ("left", "down", "right", "up"), WALK + "H is a hole: it ends the game.", lake_shown),
    "taxi": Kind(
        taxi,
        ("south", "north", "east", "west", "pickup", "dropoff"),
        "You drive the taxi @; : can be passed, | cannot. Bring the passenger to the destination.",
        taxi_shown,
    ),
    "cliff": Kind(cliff, ("up", "right", "down", "left"), WALK + "C throws you back to the start.", cliff_shown),
}
TOOLSETS: Final = {name: Toolset(kind.tools) for name, kind in KINDS.items()}


def environment() -> TextGames:
    """The entry point that the server calls, once."""
    return TextGames()


class TextGames:
    """All games. One object serves every session of its process."""

    name: ClassVar[str] = "text_games"
    isolation: ClassVar[str] = "shared"
    deterministic: ClassVar[bool] = True
    runs_code: ClassVar[bool] = False
    max_turns: ClassVar[int] = 200

    def tasks(self, split: str) -> Tasks:
        """`text_games` (the default), or one kind of game: `lake`, `taxi`, `cliff`."""
        if (split or self.name) == self.name:
            return Tasks(TASKS)
        if split not in KINDS:
            raise unknown_split(split, [self.name, *KINDS])
        return Tasks([task for task in TASKS if task.startswith(split)])

    def open(self, task: str, seed: int, options: Mapping[str, Any]) -> tuple[Game, Reply]:
        """A game at its beginning. Raises EnvironmentFault."""
        if not isinstance(slippery := options.get("slippery", False), bool) or options.keys() > {"slippery"}:
            raise EnvironmentFault(ErrorCode.BAD_REQUEST, "text_games takes one option, `slippery`: true or false")
        name, number = parts(task)
        return Game.begun(name, number, slippery=slippery, seed=seed)

    def solution(self, task: str) -> Sequence[bytes]:
        """A shortest way to the goal."""
        name, number = parts(task)
        game = KINDS[name].make(number, False)
        start, _ = game.reset(seed=number)
        return [said(KINDS[name].moves[move]) for move in shortest(game.unwrapped.P, int(start))]


def parts(task: str) -> tuple[str, int]:
    """A task's kind and number. Raises EnvironmentFault."""
    if task not in TASKS:
        raise unknown_task(task, f"there are lake_0 to lake_{LAKES - 1}, taxi_0 to taxi_{FARES - 1}, cliff_0")
    name, _, number = task.partition("_")
    return name, int(number)


def shortest(table: Mapping[int, Mapping[int, Sequence[tuple[float, int, float, bool]]]], start: int) -> list[int]:
    """The fewest moves to an end that is no hole, in Gymnasium's table: state -> move -> what follows."""
    ways: dict[int, list[int]] = {start: []}
    waiting = deque([start])
    while waiting:
        state = waiting.popleft()
        for move, ((_, after, reward, ended),) in table[state].items():
            if ended and reward:
                return [*ways[state], move]
            if not ended and int(after) not in ways:
                ways[int(after)] = [*ways[state], move]
                waiting.append(int(after))
    raise EnvironmentFault(ErrorCode.UNAVAILABLE, "this game cannot be won")


def said(direction: str) -> bytes:
    """The action that moves there."""
    function = {"name": "move", "arguments": orjson.dumps({"direction": direction}).decode()}
    call = {"id": "call_0", "type": "function", "function": function}
    return orjson.dumps({"role": "assistant", "content": None, "tool_calls": [call]})


class Game:
    """One episode: a game of Gymnasium's and whether it was won."""

    def __init__(self, kind: Kind, game: gymnasium.Env[int, int]) -> None:
        self._kind = kind
        self._game = game
        self._won = False

    @classmethod
    def begun(cls, name: str, number: int, *, slippery: bool, seed: int) -> tuple[Game, Reply]:
        """The game and its first observation. Where it begins is the task's; what chance does later is the seed's."""
        kind = KINDS[name]
        game = kind.make(number, slippery)
        state, _ = game.reset(seed=number)
        game.unwrapped.np_random = gymnasium.utils.seeding.np_random(seed)[0]
        messages = [{"role": "user", "content": f"{kind.rules}\n\n{kind.shown(game, int(state))}"}]
        return cls(kind, game), Reply(observation(messages, toolset=TOOLSETS[name]), toolset=TOOLSETS[name])

    def step(self, action: bytes) -> Reply:
        """One move; a message that is none costs a turn and moves nothing."""
        call, direction = asked(action)
        if direction not in self._kind.moves:
            return answered(call, f"Call `move` once, with one of: {', '.join(self._kind.moves)}.")
        state, reward, ended, out_of_time, _ = self._game.step(self._kind.moves.index(direction))
        self._won = ended and float(reward) != 0.0
        text = self._kind.shown(self._game, int(state))
        if ended or out_of_time:
            text += "\nYou have won." if self._won else "\nYou have lost."
        return answered(call, text, reward=float(reward), done=ended or out_of_time)

    def evaluate(self, params: Mapping[str, Any]) -> Grade:
        """1.0 where the goal is reached."""
        return Grade(float(self._won))

    def close(self) -> None:
        """Let the game go."""
        self._game.close()


def answered(call: str | None, text: str, *, reward: float = 0.0, done: bool = False) -> Reply:
    """A reply to a call, or to a message without one."""
    message = (
        {"role": "user", "content": text} if call is None else {"role": "tool", "tool_call_id": call, "content": text}
    )
    return Reply(observation([message]), reward, done)


def asked(action: bytes) -> tuple[str | None, str]:
    """The id and the direction of a message's call; None and "" where it has none, or several."""
    try:
        (call,) = orjson.loads(action)["tool_calls"]
        function = call["function"]
        direction = orjson.loads(function["arguments"])["direction"] if function["name"] == "move" else ""
        return str(call["id"]), str(direction)
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None, ""
