"""Judging a pruned model: exact match per task, and how sure a difference is."""
