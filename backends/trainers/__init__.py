"""Trainer queues."""
