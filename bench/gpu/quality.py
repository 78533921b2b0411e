"""What speed costs: the quickstart's task, learned in several ways, with clips that no way has seen; FP8's loss curve.

As `scripts/quickstart.sh --compare` has it: stage 1 trains a small model whole, stage 2 adapts its projector to another
tower's features, once in each way. Everything is in bf16. Both towers' features are extracted on the device.
"""

import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  imported before the task's time begins

from bench.gpu import runs
from bench.harness import ROOT
from fastvid import convert, extract
from fastvid.model.quantize import check_device

sys.path.append(str(ROOT / "scripts" / "quickstart"))

_FIRST, _SHARED = ("--question_order", "video_first"), ("--share_video", "True")
WAYS = {  # {name: (flags of stage 2, the way that it must do as well as)}
    "exact": ((), None),
    "shared": (_SHARED, "exact"),
    "FP8": (("--frozen_dtype", "fp8"), "exact"),
    "video first": (_FIRST, None),
    "video first, shared": ((*_FIRST, *_SHARED), "video first"),
}
FAMILIES = "first", "left"
CHANCE = 2  # standard deviations of the difference of two counts that are put down to chance


def folder():
    return Path(os.environ["FASTVID_CHECK_SCRATCH"]) / "quality"


def clips(small):
    """Draw the clips, write their questions, and build two towers, a tokenizer and an untrained model."""
    if find_spec("av") is None:
        yield {"row": "clips", "absent": "PyAV is not installed"}
        return
    import build_models
    import draw_clips

    shutil.rmtree(folder(), ignore_errors=True)
    draw_clips.main([str(folder()), *(["--train_clips", "1", "--held_out_clips", "1"] if small else [])])
    build_models.main([str(folder())])
    yield {"row": "clips", "clips": len(list((folder() / "videos").iterdir()))}


def fp8_curve(small):
    """Stage 2 over a model of 113M in FP8 beside bf16: same samples, order and seed.

    As `bench/results/frozen_dtype-113m.json` was made on a CPU: 80 steps of stage 1 before, so that there is something
    to adapt, and 4 samples a step.
    """
    if find_spec("av") is None:
        yield {"row": "FP8 curve", "absent": "PyAV is not installed"}
        return
    try:
        check_device("fp8", torch.device(runs.DEVICE))
    except ValueError as error:
        yield {"row": "FP8 curve", "absent": str(error)}
        return
    import build_models

    made, larger = folder(), folder() / "larger"
    _features(made)
    shutil.copytree(made / "llava_base", larger / "model")  # for the tokenizer
    sizes = {} if small else {"hidden": 768, "layers": 16, "heads": 12, "intermediate": 2048}
    build_models.build_llava(larger / "model", made / "tower_a", 0, **sizes)
    before, steps = (2, 3) if small else (80, 200)
    common = ["--data_path", made / "train.json", "--bf16", "True", "--dataloader_num_workers", 0, "--seed", 0]
    runs.run(
        [
            "--model_name_or_path",
            larger / "model",
            "--video_folder",
            made / "features_a",
            "--output_dir",
            larger / "base",
            "--max_steps",
            before,
            "--learning_rate",
            "3e-4",
            "--warmup_ratio",
            "0.05",
            "--per_device_train_batch_size",
            8,
            *common,
        ]
    )
    runs.as_base(larger / "base", larger / "trained")
    flags = [
        "--model_name_or_path",
        larger / "trained",
        "--video_folder",
        made / "features_b",
        "--output_dir",
        larger / "out",
        "--tune_mm_mlp_adapter",
        "True",
        "--max_steps",
        steps,
        "--learning_rate",
        "2e-3",
        "--warmup_ratio",
        "0.03",
        "--per_device_train_batch_size",
        4,
        *common,
    ]
    bf16, fp8 = runs.losses(flags), runs.losses([*flags, "--frozen_dtype", "fp8"])
    yield {"row": "FP8 curve", "steps": steps, **curve_errors(fp8, bf16)}


def curve_errors(found, baseline, last=50, limit=5e-3):
    """A row's figures: means of two loss curves, and how far they are apart, of all steps and of the last."""

    def mean(values):
        return sum(values) / len(values)

    errors = [mean(found[-n:]) / mean(baseline[-n:]) - 1 for n in (len(found), last)]
    return {
        "fp8": mean(found),
        "bf16": mean(baseline),
        "first bf16": baseline[0],
        "last bf16": mean(baseline[-last:]),
        "relative error": errors[0],
        f"of the last {last}": errors[1],
        "losses": [[round(value, 4) for value in values[::10]] for values in (found, baseline)],
        "status": "ok" if all(abs(error) <= limit for error in errors) else "failed",
    }


_AT_ONCE = len(WAYS) if runs.DEVICE == "cuda" else 0


def answers(small, at_once=_AT_ONCE):
    """Right answers to held-out questions after stage 2, a row for each of WAYS.

    Args:
        at_once: ways in processes of their own; 0: here, one after the other.
    """
    if find_spec("av") is None:
        yield {"row": "answers", "absent": "PyAV is not installed"}
        return
    made, found = folder(), {}
    # A way's steps wait for launches, so the ways share a GPU; their processes import while stage 1 runs.
    beside = ProcessPoolExecutor(at_once, get_context("spawn")) if at_once else nullcontext()
    with beside as pool:
        if pool:
            for _ in range(at_once):
                pool.submit(_imported)
        yield _base(made, small)
        begun = {name: pool.submit(way, made, name, small) if pool else None for name in WAYS}
        for name, future in begun.items():
            row = future.result() if future else way(made, name, small)
            found[name] = row
            yield row if "absent" in row else row | verdict(name, found, small)


def _imported():
    return torch.cuda.is_available()


def _features(made):
    """Features of both towers, and the training data, unless another task of this run has made them."""
    if (made / "train.json").exists():
        return
    for tower in "ab":
        code = extract.main(
            [
                "--video_dir_path",
                f"{made}/videos",
                "--clip_feat_path",
                f"{made}/features_{tower}",
                "--vision_tower",
                f"{made}/tower_{tower}",
                "--num_frames",
                "16",
            ]
        )
        if code:
            raise RuntimeError(f"extraction with tower {tower} ended with code {code}")
    convert.main(
        [
            "--input_json_file",
            f"{made}/videoinstruct.json",
            "--output_json_file",
            f"{made}/train.json",
            "--clip_feature_path",
            f"{made}/features_a",
        ]
    )


def _base(made, small):
    """Stage 1, and how many answers its model gets right."""
    _features(made)
    state = runs.run(
        [
            "--model_name_or_path",
            made / "llava_base",
            "--video_folder",
            made / "features_a",
            "--output_dir",
            made / "stage1",
            "--max_steps",
            2 if small else 500,
            "--learning_rate",
            "1e-3",
            "--warmup_ratio",
            "0.05",
            *_flags(made, small),
        ]
    )
    runs.as_base(made / "stage1", made / "llava")
    return {"row": "base", **_asked(made, "features_a", state)}


def way(made, name, small):
    """Stage 2 in one of WAYS, and its row."""
    flags, _ = WAYS[name]
    if "fp8" in flags:
        try:
            check_device("fp8", torch.device(runs.DEVICE))
        except ValueError as error:
            return {"row": name, "absent": str(error)}
    output = made / "ways" / name.replace(",", "").replace(" ", "_")
    state = runs.run(
        [
            "--model_name_or_path",
            made / "llava",
            "--video_folder",
            made / "features_b",
            "--output_dir",
            output,
            "--tune_mm_mlp_adapter",
            "True",
            "--max_steps",
            2 if small else 360,
            "--learning_rate",
            "2e-3",
            "--warmup_ratio",
            "0.03",
            *flags,
            *_flags(made, small),
        ]
    )
    return {"row": name, **_asked(made, "features_b", state, output / "mm_projector.bin")}


def _flags(made, small):
    return (
        "--data_path",
        made / "train.json",
        "--bf16",
        "True",
        "--per_device_train_batch_size",
        4 if small else 32,
        "--dataloader_num_workers",
        "0",
        "--on_bad_sample",
        "skip",
        "--save_steps",
        1000,
        "--seed",
        0,
    )


def _asked(made, features, state, projector=None):
    from evaluate import right_answers

    found = right_answers(
        made,
        made / features,
        turned=False,
        model_name_or_path=str(made / "llava"),
        projector=projector and str(projector),
    )
    counts = {
        f"{family} {key}": value
        for family in FAMILIES
        for key, value in (
            ("right", round(found[family]["right"] * found[family]["questions"])),
            ("asked", found[family]["questions"]),
        )
    }
    return counts | {"steps": state.step, "skipped": state.loader.skipped}


def verdict(name, found, small):
    """What a way's row says of the others': how it did beside the one that it must do as well as.

    Args:
        found: {way: row} so far.
    """
    from report import LEAST_RIGHT

    row, like = found[name], WAYS[name][1]
    faults = [f"{row['skipped']} samples were skipped"] if row["skipped"] else []
    for family in FAMILIES if like else ():
        other = found[like][f"{family} right"]
        allowed = spread(row[f"{family} right"], other, row[f"{family} asked"])
        if other - row[f"{family} right"] > allowed:
            faults.append(
                f"{family}: {row[f'{family} right']} of {row[f'{family} asked']} right, {like} has {other}; "
                f"{allowed:.1f} fewer are put down to chance"
            )
    if name == "exact" and not small:
        faults += [
            f"{family}: {row[f'{family} right']} of {row[f'{family} asked']} right, too few to compare with"
            for family in FAMILIES
            if row[f"{family} right"] < LEAST_RIGHT * row[f"{family} asked"]
        ]
    return {"like": like, "status": "failed" if faults else "ok", **({"error": "; ".join(faults)} if faults else {})}


def spread(one, other, asked):
    """How far two counts of right answers may be apart by chance: CHANCE standard deviations, never of no error."""
    share = (one + other + 1) / (2 * asked + 2)
    return CHANCE * (2 * asked * share * (1 - share)) ** 0.5
