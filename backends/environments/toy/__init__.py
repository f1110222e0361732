"""A tiny environment with scripted faults, for tests and first steps."""
