"""Ask a model about the held-out clips, and count the answers that are right to the letter.

    python evaluate.py OUT --name "after stage 1" --model FOLDER --features FOLDER [--projector FILE]
        [--results compare.jsonl]

appends one line to ``OUT/results.jsonl``. Beside the plain questions it asks each family about its clips with one kind
of video token turned around: the temporal tokens in reverse order, the spatial grid mirrored. The clip then shows the
opposite, so a model that reads these tokens changes its answer, and the share of answers that are still "right" falls
to nothing.
"""

import argparse
import json
from pathlib import Path

from draw_clips import FRAMES, PATCH, SIZE

from fastvid.features.folder import FeatureFolder
from fastvid.inference.chat import Chat

GRID = SIZE // PATCH


def reverse_time(features_RC):
    """Features [FRAMES + GRID², C] of the clip played backwards."""
    return features_RC[[*reversed(range(FRAMES)), *range(FRAMES, len(features_RC))]]


def mirror(features_RC):
    """Features [FRAMES + GRID², C] with left and right of the spatial grid exchanged."""
    turned = features_RC.clone()
    turned[FRAMES:] = features_RC[FRAMES:].unflatten(0, (GRID, GRID)).flip(1).flatten(0, 1)
    return turned


def right_answers(out, features, *, turned=True, **settings):
    """{family: {"right", "turned": shares of the held-out questions, "questions": how many}}.

    Args:
        out: folder with held_out.jsonl.
        features: folder of the held-out clips' features.
        turned: ask about turned clips too.
        settings: of `fastvid.chat.Chat`.
    """
    asked = [json.loads(line) for line in (Path(out) / "held_out.jsonl").read_text().splitlines()]
    folder, chat, result = FeatureFolder(features), Chat(max_new_tokens=8, **settings), {}
    for family, turn in (("first", reverse_time), ("left", mirror)):
        items = [(folder.load(item["video"])[0], item) for item in asked if item["family"] == family]

        def share(change):
            right = [
                chat.ask_features(change(features_RC), item["question"]) == item["answer"]
                for features_RC, item in items
            ]
            return sum(right) / len(right)

        result[family] = {
            "right": share(lambda features_RC: features_RC),
            **({"turned": share(turn)} if turned else {}),
            "questions": len(items),
        }
    chat.close()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--features", required=True)
    parser.add_argument("--projector")
    parser.add_argument("--results", default="results.jsonl", help="file in OUT that takes the line")
    arguments = parser.parse_args()

    result = {
        "name": arguments.name,
        **right_answers(
            arguments.out, arguments.features, model_name_or_path=arguments.model, projector=arguments.projector
        ),
    }
    with open(arguments.out / arguments.results, "a") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
