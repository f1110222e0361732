"""The Berkeley Function Calling Leaderboard as an environment: upstream's tasks, simulators and checkers."""
