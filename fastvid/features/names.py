"""The endings of feature files, and what a name is without its ending."""

import os

from fastvid.files import VIDEO_SUFFIXES

SUFFIXES = (".safetensors", ".pkl", ".npy", ".pt")  # of feature files, in the order in which one of several is read


def stem(name: str) -> str:
    """`name` without the ending of a feature file or a video."""
    before, suffix = os.path.splitext(name)
    return before if suffix.lower() in SUFFIXES + VIDEO_SUFFIXES else name
