"""Logged data: slates of the logging policy and their clicks, generated, stored, checked and read back.

A data set is a directory of `.npz` chunks and a `schema.json` that is written last: what has one is complete. On the
host; called by runs, pre-training and experiments. Source: paper section 5.1.
"""

from gemsjax.datasets.files import read_schema
from gemsjax.datasets.generation import LoggedData, generate, summary
from gemsjax.datasets.loading import LoggedSlates, Split, load, mean_return, returns, split, unpack

__all__ = [
    "LoggedData",
    "LoggedSlates",
    "Split",
    "generate",
    "load",
    "mean_return",
    "read_schema",
    "returns",
    "split",
    "summary",
    "unpack",
]
