"""Words that texts, files and folders share: special tokens as texts spell them, and the endings of files."""

import os

from fastvid.files import VIDEO_SUFFIXES

VIDEO = "<video>"  # in a record's text, where a video's rows go
PATCH, START, END = "<vid_patch>", "<vid_start>", "<vid_end>"  # of the model
BOS, EOS, UNK = "<s>", "</s>", "<unk>"
USER, ASSISTANT = "USER", "ASSISTANT"  # the template's roles
SUFFIXES = (".safetensors", ".pkl", ".npy", ".pt")  # of feature files, in the order in which one of several is read


def stem(name) -> str:
    """`name` without the ending of a feature file or a video."""
    before, suffix = os.path.splitext(name)
    return before if suffix.lower() in SUFFIXES + VIDEO_SUFFIXES else name
