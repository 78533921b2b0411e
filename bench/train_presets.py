"""What the training benchmark runs: sizes by preset, and the rows of the ladder."""

import math
from dataclasses import dataclass

QUESTIONS = (8, 7)  # of a video, in turn: 7.5 on average, as VideoInstruct-100K has it
BASELINES = "reference", "strong", "tuned"  # rows of transformers' model
LORA_BASELINES = "lora_recipe", "lora_tuned"  # rows of transformers' model with PEFT


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of its videos.

    Attributes:
        video_rows, channels: of each video's features.
    """

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int = 32003
    video_rows: int = 676
    channels: int = 1024

    @property
    def parameters(self):
        """Of the language model."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden


@dataclass(frozen=True)
class Row:
    """One way of making the same optimizer step.

    Attributes:
        title: what it adds to the row above it.
        kind: a class of `bench.baselines`, or "fastvid".
        flags: of fastvid's command line, beside those of every row.
        last_layer: the last layer computes supervised rows only.
        apart: the system prompt's keys and values are kept; rows before the first trained one get no gradient.
        micro_batch: samples of a forward pass, where it is not the preset's.
        budget: micro-batches are filled to `--tokens_per_batch`, of which there are two a step.
        full: everything is trained, not the adapter.
        for_memory: on a GPU one step is timed, without a warm-up: its figure is the peak of memory.
        rounds: timed steps, where not the preset's; 0: its loss is compared, nothing else.
        like: the row whose loss and gradient norm it must have.
        tolerance: largest relative difference of the two, where it is not the precision's (`bench.train_step`).
    """

    title: str
    kind: str = "fastvid"
    flags: tuple[str, ...] = ()
    last_layer: bool = True
    apart: bool = True
    micro_batch: int | None = None
    budget: bool = False
    full: bool = False
    for_memory: bool = False
    rounds: int | None = None
    like: str | None = "reference"
    tolerance: tuple[float, float] | None = None

    @property
    def model_flags(self):
        """Those of its flags that decide what the model is made of: rows that share them can share a model."""
        pairs = zip(self.flags, (*self.flags[1:], ""))
        return tuple(
            f"{flag} {value}"
            for flag, value in pairs
            if flag in ("--recompute", "--frozen_dtype", "--attn_implementation", "--optim", "--master_dtype")
            or flag.startswith("--lora_")
        )


_NONE, _ALL = ("--recompute", "none"), ("--recompute", "full")
_LORA = ("--lora_enable", "True", "--lora_r", "64", "--lora_alpha", "128", "--lora_dropout", "0")
_FP8, _ROUGHLY = ("--frozen_dtype", "fp8"), (5e-3, 0.2)
_FIRST, _SDPA = ("--question_order", "video_first"), ("--attn_implementation", "sdpa")
ROWS = {
    "reference": Row("reference's recipe (transformers)", "reference", like=None),
    "strong": Row("transformers with what its libraries offer, nothing recomputed", "strong"),
    "tuned": Row("the same tuned by hand: sorted by length, no mask, two rows trained", "tuned", rounds=2),
    "packed": Row(
        "fastvid: packed rows, frozen weights in the compute dtype, head on supervised rows",
        flags=(*_ALL, *_SDPA),
        last_layer=False,
        apart=False,
        rounds=2,
    ),
    "kept": Row("+ nothing recomputed", flags=(*_NONE, *_SDPA), last_layer=False, apart=False, rounds=2),
    "last": Row("+ last layer on supervised rows", flags=(*_NONE, *_SDPA), apart=False, rounds=2),
    "apart": Row("+ system prompt kept, no gradient before the video", flags=(*_NONE, *_SDPA), rounds=2),
    "exact": Row("exact: + attention by the best kernel at hand (bf16 on a CPU: its own)", flags=_NONE),
    "whole": Row("exact, but whole samples: no prompt kept, a gradient for every row", flags=_NONE, apart=False),
    "exact_8448": Row(
        "exact, batches of 8,448 rows", flags=(*_NONE, "--tokens_per_batch", "8448"), budget=True, like=None
    ),
    "exact_16896": Row(
        "exact, batches of 16,896 rows", flags=(*_NONE, "--tokens_per_batch", "16896"), budget=True, like=None
    ),
    "unpadded": Row(
        "transformers without padding: packed samples, varlen attention, Liger where installed", "unpadded", rounds=2
    ),
    "compiled": Row("tuned by hand, and torch.compile(dynamic=True)", "compiled", rounds=2),
    "recomputed": Row("exact, with --recompute full", flags=_ALL, rounds=2),
    "strong_video_first": Row("transformers, video first", "strong", flags=_FIRST, rounds=0, like=None),
    "shared": Row(
        "shared: exact + video first, its rows shared by its questions",
        flags=(*_NONE, *_FIRST, "--share_video"),
        micro_batch=15,
        like="strong_video_first",
    ),
    "lora_recipe": Row("LLaVA's LoRA recipe (transformers and PEFT), r 64", "lora_recipe", like=None),
    "lora_tuned": Row("the same tuned by hand: nothing recomputed, sorted, no mask", "lora", like="lora_recipe"),
    "lora": Row("fastvid: LoRA, r 64", flags=(*_NONE, *_LORA), like="lora_recipe"),
    "fp8": Row("exact, frozen weights in FP8", flags=(*_NONE, *_FP8), like="exact", tolerance=_ROUGHLY),
    "fp8_16896": Row(
        "exact, frozen weights in FP8, batches of 16,896 rows",
        budget=True,
        like=None,
        flags=(*_NONE, *_FP8, "--tokens_per_batch", "16896"),
    ),
    "shared_fp8": Row(
        "shared, frozen weights in FP8",
        flags=(*_NONE, *_FIRST, "--share_video", *_FP8),
        micro_batch=30,
        like="shared",
        tolerance=_ROUGHLY,
    ),
    "smallest": Row(
        "exact, one sample at a time, all recomputed", flags=_ALL, micro_batch=1, rounds=1, for_memory=True
    ),
    "smallest_nf4": Row(
        "the same, frozen weights in NF4",
        flags=(*_ALL, "--frozen_dtype", "nf4"),
        micro_batch=1,
        rounds=1,
        for_memory=True,
        like="exact",
        tolerance=(5e-2, 0.5),
    ),
    "full": Row(
        "full fine-tune, 8-bit AdamW, bf16 weights",
        full=True,
        micro_batch=8,
        rounds=2,
        like="exact",
        tolerance=(1e-3, math.inf),  # of another gradient
        flags=("--optim", "adamw_8bit", "--master_dtype", "bfloat16", "--recompute", "auto"),
    ),
}


@dataclass(frozen=True)
class Preset:
    """A run of the benchmark.

    Attributes:
        videos: whose questions make one optimizer step.
        budget_videos: those whose questions fill batches up to a budget of rows.
        micro_batch: most samples of a forward pass.
        rows: {dtype: names of the rows, in the ladder's order}.
        rounds: {dtype: timed steps of each row}.
    """

    shape: Shape
    videos: int
    micro_batch: int
    rows: dict[str, tuple[str, ...]]
    rounds: dict[str, int]
    budget_videos: int = 0


_LADDER = (*BASELINES, "packed", "kept", "last", "apart", "exact", "recomputed", "strong_video_first", "shared")
_LORA_ROWS = ("lora_recipe", "lora_tuned", "lora")
_BOTH = {"bf16": _LADDER, "fp32": (*BASELINES, "exact", "strong_video_first", "shared")}
_GPU = {
    "bf16": (
        "exact",
        "exact_8448",
        "exact_16896",
        "whole",
        "shared",
        "fp8",
        "fp8_16896",
        "shared_fp8",
        "full",
        "unpadded",
        "strong",
        "strong_video_first",
        "tuned",
        "reference",
        "smallest",
        "smallest_nf4",
        "compiled",
    )
}
_TINY = Shape(64, 2, 2, 128, 640, 24, 16)
_7B, _13B = Shape(4096, 32, 32, 11008), Shape(5120, 40, 40, 13824)
PRESETS = {
    "tiny": Preset(_TINY, 2, 8, _BOTH, {"bf16": 1, "fp32": 1}),
    "tiny-gpu": Preset(_TINY, 4, 8, _GPU, {"bf16": 1}, 8),
    "cpu-110m": Preset(Shape(768, 12, 12, 2048), 2, 8, _BOTH, {"bf16": 3, "fp32": 2}),
    "cpu-110m-lora": Preset(
        Shape(768, 12, 12, 2048), 2, 8, dict.fromkeys(("bf16", "fp32"), _LORA_ROWS), {"bf16": 5, "fp32": 2}
    ),
    "gpu-7b": Preset(_7B, 4, 8, _GPU, {"bf16": 3}, 12),
    "gpu-13b": Preset(_13B, 4, 8, {"bf16": ("tuned", "exact", "fp8", "full")}, {"bf16": 2}, 12),
}
