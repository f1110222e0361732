"""The command `rollout`."""
