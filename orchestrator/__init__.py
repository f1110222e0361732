"""Mechanism: what runs when, exactly once."""
