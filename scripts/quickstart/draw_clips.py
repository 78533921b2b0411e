"""Draw short H.264 clips whose content is known, and the question-answer pairs about them.

    python draw_clips.py OUT [--seed 0] [--train_clips 10] [--held_out_clips 12]

writes ``OUT/videos/*.mp4``, ``OUT/videoinstruct.json`` (training pairs in VideoInstruct's format: a list of
``{"q", "a", "video_id"}``) and ``OUT/held_out.jsonl`` (``{"video", "family", "question", "answer"}``).

Two families of clips, one for each kind of video token that a Video-ChatGPT model reads:

- *first*: one rectangle that changes its colour midway. Averaged over time both orders look the same, so only the
  temporal tokens (one per frame) tell which colour comes first.
- *left*: two still rectangles side by side. Averaged over space both sides look the same, so only the spatial tokens
  (one per patch) tell which colour is on the left.

Held-out clips show pairs of colours that no training clip of either family shows: remembering pairs does not help, and
a model that merely names one of the two colours it sees is right half of the time.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

import av
import numpy as np

SIZE, PATCH, FRAMES = 64, 16, 16
COLOURS = {
    "red": (220, 40, 40),
    "blue": (50, 70, 220),
    "green": (40, 180, 60),
    "yellow": (225, 210, 50),
    "white": (240, 240, 240),
    "black": (20, 20, 20),
    "pink": (230, 80, 200),
    "cyan": (60, 210, 220),
}
PAIRS = list(itertools.permutations(COLOURS, 2))
HELD_OUT_PAIRS = [
    pair for pair in PAIRS if set(pair) in ({"red", "blue"}, {"green", "yellow"}, {"white", "black"}, {"pink", "cyan"})
]
TRAIN_PAIRS = [pair for pair in PAIRS if pair not in HELD_OUT_PAIRS]
TRAIN_CLIPS, HELD_OUT_CLIPS = 10, 12  # per family and ordered pair: 48 · 10 to train with, 8 · 12 held out
QUESTIONS = {
    "first": ["Which colour comes first?", "Which colour is shown first?", "What colour does the clip start with?"],
    "left": ["Which colour is on the left?", "Which colour is on the left side?", "What colour is the left one?"],
}


def draw(family, pair, rng):
    """One clip as uint8 frames [FRAMES, SIZE, SIZE, 3].

    Rectangles cover whole patches of the tower: if they cut through one, the temporal tokens would tell the side.
    """
    frames = np.full((FRAMES, SIZE, SIZE, 3), rng.integers(80, 180), np.float32)
    one, other = (np.float32(COLOURS[name]) for name in pair)
    if family == "first":  # three by three of the four by four patches
        row, column = PATCH * rng.integers(0, 2, 2)
        switch = round(FRAMES * rng.uniform(0.35, 0.65))
        frames[:switch, row : row + 3 * PATCH, column : column + 3 * PATCH] = one
        frames[switch:, row : row + 3 * PATCH, column : column + 3 * PATCH] = other
    else:  # each two patches wide, and two or three high
        height = rng.integers(2, 4)
        top, bottom = PATCH * (rng.integers(0, 5 - height) + np.array([0, height]))
        frames[:, top:bottom, : 2 * PATCH] = one
        frames[:, top:bottom, 2 * PATCH :] = other
    frames += rng.normal(0, 6, frames.shape)
    return frames.clip(0, 255).astype(np.uint8)


def write_video(path, frames):
    """Encode frames [T, H, W, 3] as H.264, 8 of them a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "18", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.thread_count = 1  # the same file each time
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train_clips", type=int, default=TRAIN_CLIPS, help="of each family and ordered pair")
    parser.add_argument("--held_out_clips", type=int, default=HELD_OUT_CLIPS, help="the same, held out")
    arguments = parser.parse_args(argv)
    rng, shuffle = np.random.default_rng(arguments.seed), random.Random(arguments.seed)
    videos = arguments.out / "videos"
    videos.mkdir(parents=True, exist_ok=True)

    training, held_out = [], []
    for split, pairs, clips in (
        ("train", TRAIN_PAIRS, arguments.train_clips),
        ("held_out", HELD_OUT_PAIRS, arguments.held_out_clips),
    ):
        for family, pair, number in itertools.product(QUESTIONS, pairs, range(clips)):
            name = f"{split}_{family}_{pair[0]}_{pair[1]}_{number:02}"
            write_video(videos / f"{name}.mp4", draw(family, pair, rng))
            if split == "train":  # two questions about each clip
                training += [{"q": q, "a": pair[0], "video_id": name} for q in shuffle.sample(QUESTIONS[family], 2)]
            else:
                question = shuffle.choice(QUESTIONS[family])
                held_out.append({"video": f"{name}.mp4", "family": family, "question": question, "answer": pair[0]})
    shuffle.shuffle(training)  # the converter puts the video before or after the question by a record's index

    (arguments.out / "videoinstruct.json").write_text(json.dumps(training, indent=1))
    (arguments.out / "held_out.jsonl").write_text("".join(json.dumps(record) + "\n" for record in held_out))
    print(f"{len(list(videos.iterdir()))} clips, {len(training)} training pairs, {len(held_out)} held-out questions")


if __name__ == "__main__":
    main()
