"""The endings of feature files, and what a name is without its ending."""

import os

from fastvid.files import MEDIA_SUFFIXES

SUFFIXES = (".safetensors", ".pkl", ".npy", ".pt")  # of feature files, in the order in which one of several is read


def stem(name: str) -> str:
    """`name` without the ending of a feature file, a video or an image."""
    before, suffix = os.path.splitext(name)
    return before if suffix.lower() in SUFFIXES + MEDIA_SUFFIXES else name
