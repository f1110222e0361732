"""What `rollout env new` writes, under the name that it replaces."""
