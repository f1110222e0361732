"""Decisions: who acts."""
