"""Deliberate faults in kernels, at least three for each, and the test that must see each of them.

`MUTATIONS[name]` are faults of ``fastvid_kernels/<name>.py``, seen by tests of ``test_<name>.py``.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    old: str  # occurs once in the file
    new: str
    test: str  # function, or function[parameters]


MUTATIONS = {}
