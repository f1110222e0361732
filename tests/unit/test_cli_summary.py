"""The summary: two scopes told apart, and nothing shown that was not measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.cli.summary import rows
from orchestrator.summary import Summary, sandbox_cpu_per_step

ONCE = Summary(
    run="r", out="runs/r", state="finished", environment="toy", episodes=800, planned=800,
    outcomes={"completed": 800}, reward_mean=1.0, reward_one=800, steps=4_000, wall_s=2.0, episodes_per_s=400.0,
    steps_per_s=2_000.0, cpu_us_per_step_orchestrator=20.0, cpu_us_per_step_sandbox=150.0, peak_rss_mb=90.0,
    model_calls=0, prompt_tokens=0, completion_tokens=0, recovered_episodes=0, duplicates=0, redelivered=0, groups=800,
    lives=1, life_episodes=800, life_steps=4_000, cpu_s_sandbox=0.6,
)  # fmt: skip
RESUMED = replace(
    ONCE, lives=2, life_episodes=492, life_steps=2_460, wall_s=0.5, episodes_per_s=984.0, steps_per_s=4_920.0,
    failures={"policy": 3},
)  # fmt: skip


def test_a_run_of_one_life_says_nothing_of_lives() -> None:
    shown = dict(rows(ONCE.as_dict()))
    assert shown["time"] == "800 episodes and 4,000 steps in 2.0 s"
    assert shown["speed"] == "400.0 episodes/s, 2,000 steps/s"
    assert shown["CPU a step"] == "20.0 us orchestrator, 150.0 us sandboxes"
    assert "since resume" not in shown


def test_after_a_resume_the_figures_of_the_last_life_are_said_to_be_its_own() -> None:
    shown = dict(rows(RESUMED.as_dict()))
    names = list(shown)
    assert shown["episodes"] == "800: completed 800"
    assert shown["steps"] == "4,000"
    assert shown["since resume"].startswith("492 episodes and 2,460 steps in 0.5 s; the figures down to failures")
    assert names[names.index("since resume") :][:5] == [
        "since resume",
        "speed",
        "CPU a step",
        "peak memory",
        "failures",
    ]
    assert not {"episodes", "reward", "steps", "recovered", "delivery"} & set(names[names.index("since resume") :])


@pytest.mark.parametrize(
    ("cpu_s", "steps", "figure"), [(0.0, 100, None), (0.49, 100, None), (0.5, 1_000, 500.0), (1.0, 0, None)]
)
def test_cpu_too_little_to_be_measured_is_no_figure(cpu_s: float, steps: int, figure: float | None) -> None:
    assert sandbox_cpu_per_step(cpu_s, steps) == figure


def test_a_figure_that_is_not_known_is_not_shown() -> None:
    unknown = replace(ONCE, cpu_us_per_step_sandbox=None).as_dict()
    assert dict(rows(unknown))["CPU a step"] == "20.0 us orchestrator"
    assert "CPU a step" not in dict(rows(unknown | {"cpu_us_per_step_orchestrator": None}))
