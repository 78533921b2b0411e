"""Few combinations of arguments that still let any two values of two arguments meet.

A fault that needs three arguments to have certain values at once is rare. Four arguments of six values each have 1,296
combinations; in 48 of them all pairs meet. Shapes drawn at random try the others.
"""

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest


def each_pair(**choices: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrise a test by `pairs` of its arguments' values; a test's name has the values as `str` has them."""
    found = pairs(*choices.values())
    return pytest.mark.parametrize(list(choices), found, ids=["-".join(map(str, values)) for values in found])


def pairs(*choices: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Combinations, one value of each of `choices`, in which every two values of different ones occur together.

    Each is one of those with most new pairs: of these one whose values occurred least so far, and the first of them.
    """
    values = [list(choice) for choice in choices]
    places = list(itertools.combinations(range(len(values)), 2))
    every = [
        (numbers, {(i, numbers[i], j, numbers[j]) for i, j in places})
        for numbers in itertools.product(*(range(len(choice)) for choice in values))
    ]
    left, used, found = set().union(*(met for _, met in every)), Counter(), []
    while left:
        numbers, met = max(every, key=lambda each: (len(each[1] & left), -sum(used[at] for at in enumerate(each[0]))))
        found.append(tuple(choice[number] for choice, number in zip(values, numbers)))
        left -= met
        used.update(enumerate(numbers))
    return found
