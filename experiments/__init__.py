"""Runnable modules, `python -m experiments.NAME`: each one's docstring gives its command, time and expected numbers."""
