"""Words that texts, files and folders share: special tokens as texts spell them, and the endings of files."""

VIDEO = "<video>"  # in a record's text, where a video's rows go
IMAGE = "<image>"  # where an image's do, in records of images
PATCH, START, END = "<vid_patch>", "<vid_start>", "<vid_end>"  # of the model
BOS, EOS, UNK = "<s>", "</s>", "<unk>"
USER, ASSISTANT = "USER", "ASSISTANT"  # the template's roles
