"""Agents: replay, scripted, chat."""
