"""Whole migrations under faults that are random and repeatable by their seed; `python -m tests.chaos --help`."""
