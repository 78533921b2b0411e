"""What every command accepts: one frozen dataclass per command. `fastvid.flags` fills them.

Flags keep the names of the reference's command line (and so of transformers' ``TrainingArguments``) wherever the
reference has one. A number states its range where it is declared; every dataclass checks its numbers when it is made.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from fastvid.policy import POLICIES, Lora, Policy, Trainable

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# What `--from` may name: records of these trainers and data sets (`fastvid.data.conversion`).
Style = Literal[
    "auto",
    "videoinstruct",
    "training",
    "messages",
    "sharegpt",
    "llava",
    "llava_video",
    "plm",
    "videochat2",
    "swift",
    "alpaca",
]
STYLES: tuple[str, ...] = get_args(Style)
LARGEST = 2**31 - 1  # of whole numbers, where a flag states nothing else: positions and row counts are int32


def _flag(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field.

    Args:
        help: its ``--help`` text.
        metadata: "at_least", "above", "at_most" and "below" are a number's range (of a list, each number's); "group"
            begins a group of ``--help``; "was" is an older name, which is taken too; "writes" says that a "file" or a
            "folder" is made there; "whole_from" is the number from which on only whole ones mean something.
    """
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return field(default=default, metadata={"help": help, **metadata})


def _steps(default: float, help: str, **metadata: Any) -> Any:
    """A field that counts steps: below 1, and above 0, it is a share of all steps."""
    return _flag(default, help + "; below 1: a share of all steps.", whole_from=1, **metadata)


def range_fault(value: object, metadata: Mapping[str, Any]) -> str | None:
    """The range of a number, in words, if `value` lies outside of it.

    Whole numbers are at most `LARGEST` where nothing else is stated, and no number is nan or infinite.
    """
    low, above = metadata.get("at_least"), metadata.get("above")
    high, below = metadata.get("at_most"), metadata.get("below")
    if high is None and below is None and isinstance(value, int):
        high = LARGEST
    whole = metadata.get("whole_from", math.inf)
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (low is None or value >= low)
        and (above is None or value > above)
        and (high is None or value <= high)
        and (below is None or value < below)
        and (value < whole or value == int(value))
    ):
        return None
    lower = f"{low:g} or more" if low is not None else f"more than {above:g}" if above is not None else "a number"
    upper = (
        ""
        if high is None and below is None
        else (f", at most {high:,}" if high is not None else f", less than {below:g}")
    )
    share = f"; {whole} and more are whole numbers" if whole < math.inf else ""
    return lower + upper + share


@dataclass(frozen=True)
class _Checked:
    """Numbers are checked against the ranges that their flags state, however the configuration is made."""

    def __post_init__(self) -> None:
        for flag in dataclasses.fields(self):
            value = getattr(self, flag.name)
            numbers = value if isinstance(value, list | tuple) else [value]
            for number in numbers if has_range(flag) and value is not None else ():
                if fault := range_fault(number, flag.metadata):
                    raise ValueError(f"--{flag.name} {number}: give {fault}")


def flag_of(field: dataclasses.Field) -> str:
    """The name of a field's flag, without hyphens. Fields that Python's own words would name end in "_"."""
    return field.name.removesuffix("_")


def older_names(config_class: "type[DataclassInstance]") -> dict[str, str]:
    """{older name: name} of the flags of one of these dataclasses that had another."""
    return {flag.metadata["was"]: flag.name for flag in dataclasses.fields(config_class) if "was" in flag.metadata}


def has_range(flag: dataclasses.Field) -> bool:
    """Whether a field of these dataclasses is a number, or a list of numbers, whose range is checked."""
    return any(name in flag.metadata for name in ("at_least", "above", "at_most", "below"))


@dataclass(frozen=True)
class DataConfig(_Checked):
    """What decides the token ids and labels of a sample; shared by training, inspection and validation."""

    model_name_or_path: str = field(metadata={"help": "Folder of the starting weights and tokenizer."})
    data_path: list[str] = field(
        metadata={"help": "Training JSON, JSONL or Parquet; several files, or the flag again, add up."}
    )
    version: str = _flag(
        "auto",
        "Conversation template: v1 (= vicuna_v1_1), for tokenizers of LLaMA 2's kind; chat_template, the model's own, "
        "for the others. auto: as the tokenizer is.",
        group="data and model",
    )
    video_folder: str | None = _flag(
        None,
        "Folder that the records' `video` fields are relative to: of feature files, or of videos, whose features "
        "training makes.",
    )
    mm_use_vid_start_end: bool = _flag(False, "Put <vid_start> and <vid_end> around a video's tokens.")
    model_max_length: int = _flag(2048, "Longest sample in tokens, video tokens and BOS included.", at_least=1)
    num_video_tokens: int | None = _flag(
        None, "Rows that every video must have. Default: its feature file's own.", at_least=1
    )
    vision_tower: str | None = _flag(
        None,
        "Vision tower (folder or hub id); it makes the features of videos in --video_folder that have none. "
        "Default: the model's own setting.",
    )
    num_frames: int = _flag(
        100,
        "Frames of each video that has no features yet, and temporal rows of those that are made.",
        at_least=1,
        at_most=100_000,
    )
    clip_feat_path: str | None = _flag(
        None,
        "Folder that receives the features of videos in --video_folder that have none, as fastvid extract writes "
        "them; those in it are used. Default: `features` in --output_dir.",
        writes="folder",
    )
    question_order: Literal["reference", "video_first"] = _flag(
        "reference", 'video_first: "question\\n<video>" becomes "<video>\\nquestion", for --share_video to share more.'
    )
    parity: Literal["none", "reference"] = _flag("none", "reference: compute exactly what PG-Video-LLaVA computes.")

    @property
    def policy(self) -> Policy:
        return POLICIES[self.parity]


@dataclass(frozen=True)
class TrainConfig(DataConfig):
    """Train. All that it tells goes to stderr (`2>&1 | tee log` keeps it), its figures to --output_dir/metrics.jsonl.

    Flags of PG-Video-LLaVA, Video-ChatGPT and transformers' TrainingArguments that change nothing here are accepted.
    """

    output_dir: str = field(
        kw_only=True, metadata={"help": "Checkpoints, metrics and the final weights go here.", "writes": "folder"}
    )
    data_weights: list[float] = _flag(
        [], "Passes over each --data_path file per epoch (fractions sample).", at_least=0, at_most=10**6
    )
    eval_data_path: list[str] = _flag([], "Validation JSON, JSONL or Parquet; when: --eval_strategy.")
    lazy_preprocess: bool | None = _flag(None, "Accepted, not needed: samples are always tokenized when needed.")
    share_video: bool = _flag(False, "Keep a video's samples together and compute the rows they have in common once.")
    dataloader_num_workers: int = _flag(
        2, "Processes that read and pack ahead of the step; 0 does so in line.", at_least=0, at_most=1000
    )
    on_bad_sample: Literal["error", "skip"] = _flag(
        "error",
        "Records that cannot be trained on, found at start-up (malformed, of images or audio, without an "
        "answer, without features): end the run, or skip leaves them out. What shows only when a sample is read "
        "(damaged features, a video that --model_max_length cuts) is skipped and told either way: --max_skipped.",
    )
    max_skipped: float = _flag(
        0.25,
        "Largest share of samples that may be skipped while training; the run ends where there are more.",
        at_least=0,
        at_most=1,
    )
    tune_mm_mlp_adapter: bool = _flag(
        False, "Train the projector and the start/end embeddings only.", group="what is trained"
    )
    freeze_backbone: bool = _flag(False, "Freeze the decoder; train the embedding table and the head.")
    freeze_mm_mlp_adapter: bool = _flag(False, "Freeze the projector.")
    pretrain_mm_mlp_adapter: str | None = _flag(
        None, "Projector to start from: .bin, .safetensors, a checkpoint folder or the --output_dir of its training."
    )
    mm_projector_type: Literal["linear", "mlp2x_gelu"] | None = _flag(None, "Default: as the model's config says.")
    lora_enable: bool = _flag(
        False, "Train LoRA's matrices beside a frozen decoder's, the projector and the start/end embeddings."
    )
    lora_r: int = _flag(128, "Rank of LoRA's matrices.", at_least=1, at_most=10_000)
    lora_alpha: float = _flag(256.0, "LoRA's products are scaled by alpha / r.", above=0, at_most=10**6)
    lora_dropout: float = _flag(0.05, "Share of the values that LoRA's matrices do not see.", at_least=0, below=1)
    lora_targets: list[str] = _flag(
        ["all"],
        "Matrices that get them: all, attention, mlp, or names (q_proj k_proj v_proj o_proj gate_proj up_proj "
        "down_proj).",
    )
    lora_weights: str | None = _flag(
        None, "LoRA adapter to start from: a folder in PEFT's format, a checkpoint folder, or an --output_dir."
    )
    use_rslora: bool = _flag(False, "Scale by alpha / √r instead.")
    bf16: bool = _flag(
        False,
        "Compute in bf16 over --master_dtype weights; without it everything is fp32.",
        group="precision and memory",
    )
    master_dtype: Literal["float32", "bfloat16"] = _flag(
        "float32", "Trained matrices as stored: float32 masters, or bfloat16 with stochastic rounding (--bf16)."
    )
    frozen_dtype: Literal["auto", "fp8", "int8", "nf4"] = _flag(
        "auto",
        "A frozen decoder's matrices. auto: as computed with; fp8: for a GPU's FP8 units (Ada, Hopper and "
        "later), for speed; int8 (half of bf16's bytes) and nf4 (a quarter, needs bitsandbytes): for memory.",
    )
    tf32: bool = _flag(False, "Allow TF32 matrix products for fp32 work on Ampere and later.")
    gradient_checkpointing: bool = _flag(False, "Accepted: means --recompute auto.")
    recompute: str = _flag(
        "auto",
        "Recompute activations in backward: none, selective (not matrix products), full, K "
        "(the first K layers); auto: as few layers as the memory estimate needs to fit.",
    )
    shard: Literal["auto", "full", "hybrid", "none"] = _flag(
        "auto",
        "FSDP2 sharding over ranks; auto shards what is trained and replicates a frozen backbone that fits; "
        "hybrid shards all over --shard_size ranks and keeps a copy on each such group.",
    )
    shard_size: int | None = _flag(
        None, "Ranks that hold one copy of the model (--shard hybrid). Default: a node's.", at_least=1
    )
    ddp_timeout: int = _flag(1200, "Seconds after which a rank that lives but hangs ends the job.", at_least=1)
    attn_implementation: Literal["auto", "flash", "varlen", "avx512", "sdpa"] = _flag(
        "auto", "Attention: flash-attn, torch's varlen, ours for bf16 on CPUs (avx512), or torch's SDPA."
    )
    num_train_epochs: float = _flag(3.0, "Passes over the data.", above=0, at_most=10**6, group="optimisation")
    max_steps: int = _flag(-1, "If positive, the number of optimizer steps; overrides --num_train_epochs.", at_least=-1)
    per_device_train_batch_size: int = _flag(8, "Samples per rank and micro-batch.", at_least=1, at_most=10_000)
    tokens_per_batch: int | None = _flag(
        None,
        "Tokens per rank and micro-batch, packed full; instead of --per_device_train_batch_size.",
        at_least=1,
        was="rows_per_batch",
    )
    per_device_eval_batch_size: int = _flag(8, "Samples per rank and validation batch.", at_least=1, at_most=10_000)
    gradient_accumulation_steps: int = _flag(1, "Micro-batches per optimizer step.", at_least=1, at_most=10_000)
    learning_rate: float = _flag(5e-5, "Peak learning rate.", at_least=0, at_most=100)
    mm_projector_lr: float | None = _flag(
        None, "Peak learning rate of the projector. Default: --learning_rate.", at_least=0, at_most=100
    )
    weight_decay: float = _flag(0.0, "AdamW weight decay (not applied to biases and norms).", at_least=0, at_most=100)
    adam_beta1: float = _flag(0.9, "AdamW beta 1.", at_least=0, below=1)
    adam_beta2: float = _flag(0.999, "AdamW beta 2.", at_least=0, below=1)
    adam_epsilon: float = _flag(1e-8, "AdamW epsilon.", at_least=1e-30, at_most=1)
    max_grad_norm: float = _flag(
        1.0, "Clip the global gradient norm to this; 0 does not clip.", at_least=0, at_most=10**9
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = _flag(
        "cosine", "Learning-rate schedule after warm-up."
    )
    warmup_ratio: float = _flag(0.0, "Warm-up steps as a share of all steps.", at_least=0, at_most=1)
    warmup_steps: int | float = _steps(0, "Warm-up steps; overrides --warmup_ratio when positive", at_least=0)
    optim: Literal["adamw", "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = _flag(
        "adamw",
        "adamw (adamw_torch and adamw_torch_fused are other names for it); adamw_8bit keeps moments in 8 "
        "bits, in blocks of 256; paged_adamw_8bit also lets them move to the host while the GPU is full (needs "
        "bitsandbytes).",
    )
    seed: int = _flag(42, "Seed of the sample order and of new weights.", at_least=0, at_most=2**63 - 1)
    full_determinism: bool = _flag(False, "Deterministic CUDA kernels only; a CPU always is.")
    evaluation_strategy: Literal["no", "steps", "epoch"] | None = _flag(
        None, "Older name of --eval_strategy.", group="validation, saving, logging"
    )
    eval_strategy: Literal["auto", "no", "steps", "epoch"] = _flag(
        "auto", "When to validate. auto: after each epoch where there is --eval_data_path."
    )
    eval_steps: int | float = _steps(500, "Steps between validations", above=0)
    logging_steps: int | float = _steps(10, "Steps between log lines", above=0)
    save_strategy: Literal["no", "steps", "epoch"] = _flag("steps", "When to save a checkpoint.")
    save_steps: int | float = _steps(500, "Steps between checkpoints", above=0)
    save_total_limit: int | None = _flag(None, "Keep this many newest checkpoints.", at_least=1)
    resume: Literal["auto", "never"] = _flag("auto", "auto: go on from the newest valid checkpoint in --output_dir.")
    report_to: list[str] = _flag(
        ["tensorboard"],
        "tensorboard, wandb, mlflow, trackio; all (those that are installed) or none. metrics.jsonl is always written.",
    )
    run_name: str | None = _flag(
        None, "Name of the run where it is reported and in loss_curve.png. Default: that of --output_dir."
    )
    project: str | None = _flag(
        None,
        "Project (wandb, trackio) or experiment (mlflow) that the run belongs to. "
        "Default: as their own variables say, else fastvid.",
    )
    disable_tqdm: bool = _flag(False, "No progress bar.")
    peak_tflops: float | None = _flag(
        None,
        "Peak TFLOP/s of a device, against which utilisation (mfu) is stated. Default: a known GPU's dense bf16.",
        above=0,
        at_most=10**9,
    )
    profile: bool = _flag(
        False,
        "Record three steps after three of warm-up into output_dir/profile: a trace of the "
        "operators, and on a GPU what lies in its memory.",
    )
    dry_run: bool = _flag(
        False,
        "Check flags and files, print what would be trained and the memory it takes, and stop "
        "before the first step. The model's folder need not hold weights.",
    )
    memory: str | None = _flag(None, "Plan as if each device had so much free memory: 24GiB, 80GB.")

    @property
    def trainable(self) -> Trainable:
        """The parts that get a gradient.

        The reference's own table of flag combinations, but for adapter tuning without start and end tokens (Policy);
        with LoRA, LLaVA's: the decoder is frozen, whatever else is said of it.

        Raises:
            ValueError: ``--lora_targets`` names what is no matrix of a layer.
        """
        projector = not self.freeze_mm_mlp_adapter
        if lora := Lora.of_flags(vars(self)):
            return Trainable(projector=projector, boundary=self.mm_use_vid_start_end, lora=lora)
        if self.tune_mm_mlp_adapter and self.mm_use_vid_start_end:
            return Trainable(projector=projector, boundary=True)
        if self.tune_mm_mlp_adapter:
            tables = self.policy.tune_tables_without_start_end
            return Trainable(projector=projector, embed=tables, head=tables)
        if self.freeze_backbone:
            return Trainable(embed=True, head=True)
        return Trainable(projector=projector, embed=True, decoder=True, head=True)


@dataclass(frozen=True)
class InspectConfig(TrainConfig):
    """Show what the model will see of each sample, the supervised tokens in colour. Takes a training command line."""

    model_name_or_path: str | None = field(
        default=None, kw_only=True, metadata={"help": "Folder of the starting weights and tokenizer."}
    )
    data_path: list[str] = field(
        default_factory=list,
        kw_only=True,
        metadata={"help": "Training JSON, JSONL or Parquet; several files, or the flag again, add up."},
    )
    output_dir: str = field(default="", kw_only=True, metadata={"help": "Ignored: accepted with a training command."})
    index: int | None = _flag(None, "Show this record only.", at_least=0, group="what is shown")
    json: bool = _flag(False, "One JSON line per record.")
    html: str | None = _flag(
        None,
        "A page of one record (--index) or of one video (--video): frames with their times, "
        "norms of the features, the prompt, what the header says.",
        writes="file",
    )
    video: str | None = _flag(
        None,
        "A video or a feature file to show on the page, without --data_path; beside it, "
        "the record's video. With --vision_tower the features of a video are computed.",
    )
    video_dir_path: str | None = _flag(None, "Folder of the videos that the record's frames are read from.")
    num_frames: int | None = _flag(
        None,
        "Frames per video on the page, and of each video that has no features yet. Default: as the features' "
        "header says; 100 where it does not.",
        at_least=1,
        at_most=100_000,
    )


@dataclass(frozen=True)
class ConvertConfig(_Checked):
    """VideoInstruct's records, or other trainers', to training records."""

    input_json_file: str = field(
        metadata={
            "help": "JSON, JSONL or Parquet of VideoInstruct (q, a, video_id) or of another trainer (--from); or, with "
            "--clip_feature_path, training records to filter."
        }
    )
    output_json_file: str = field(metadata={"help": "Training JSON (or JSONL, by its ending).", "writes": "file"})
    clip_feature_path: str | None = _flag(None, "Keep only records whose features lie in this folder.")
    from_: Style = _flag("auto", "Style of the records. auto: each record's own; others are refused.")
    media_root: str | None = _flag(
        None, "Folder that names of videos and images begin with, which is taken off: features lie by the rest."
    )
    on_bad: Literal["auto", "error", "drop"] = _flag(
        "auto",
        "What a malformed record does; drops are counted and told. auto: an error in the reference's records, and a "
        "drop in others.",
    )


@dataclass(frozen=True)
class ValidateConfig(DataConfig):
    """Check training records and their feature files. Takes the data flags of the training command."""

    model_name_or_path: str | None = field(
        default=None,
        kw_only=True,
        metadata={
            "help": "Folder whose tokenizer tells which samples --model_max_length cuts (with --video_folder). "
            "Default: none, and tokens are not counted."
        },
    )
    quick: bool = _flag(
        False,
        "Read the headers of feature files only, not their values, which may be NaN; compare videos by their "
        "size alone; count no tokens.",
    )
    video_dir_path: str | None = _flag(
        None,
        "Folder of the videos: those that were changed since their features were made are found (with --video_folder).",
        group="what is compared and written",
    )
    json: str | None = _flag(None, "File that receives the whole report as JSON.", writes="file")
    drop: str | None = _flag(
        None,
        "File that receives the records that nothing is wrong with, those of all --data_path files in their "
        "order; JSONL by its ending, else JSON.",
        writes="file",
    )
    overwrite: bool = _flag(False, "Replace the files of --drop and --json where they are there already.")


@dataclass(frozen=True)
class ExtractConfig(_Checked):
    """Videos to feature files."""

    video_dir_path: str = field(
        metadata={
            "help": "Folder of videos (sub-folders included), pattern ('videos/**/*.mp4'), list file (a path on each "
            "line, relative to its folder) or tar shards (shard.tar, 'shards/*.tar')."
        }
    )
    clip_feat_path: str = field(
        metadata={"help": "Folder that receives one feature file per video.", "writes": "folder"}
    )
    infer_batch: int = _flag(32, "Most frames per pass of the tower; passes are evened out.", at_least=1)
    llava: Literal["1.1", "1.5"] | None = _flag(
        None, "1.1: 224-pixel tower (Video-ChatGPT); 1.5, the default: 336-pixel."
    )
    vision_tower: str | None = _flag(None, "CLIP, SigLIP or DINO tower (hub id or folder). Default: as --llava says.")
    images: bool = _flag(
        False,
        "Take images (.jpg, .png, .webp, .bmp, .tif) as well: each is a video of one frame, without temporal rows.",
    )
    follow_links: bool = _flag(
        False,
        "Follow links in the folder of videos, to files and to folders, and lines of "
        "a list file that lead out of its folder.",
    )
    allow_damaged: bool = _flag(
        False, "Take videos of which frames are missing or decode with errors; each one's header counts them."
    )
    overwrite: bool = _flag(False, "Replace feature files that were made with other settings, or nobody knows which.")
    format: Literal["safetensors", "pkl"] = _flag("safetensors", "pkl: the reference's format.")
    num_frames: int = _flag(100, "Frames per video, and temporal rows of the features.", at_least=1, at_most=100_000)
    dtype: Literal["float16", "bfloat16", "float32"] | None = _flag(
        None, "Precision of the tower. Default: float16 on a GPU; on a CPU bfloat16 if it multiplies that, or float32."
    )
    tower_dtype: Literal["auto", "fp8"] = _flag(
        "auto",
        "fp8: the tower's matrices in FP8: faster on GPUs that have it (Ada, Hopper), slower on a CPU. The "
        "features change; the summary says by how much. auto: in --dtype.",
    )
    device: str | None = _flag(None, "torch device. Default: a GPU if there is one.")
    decoder: Literal["auto", "pyav", "nvdec", "dali"] = _flag(
        "auto",
        "auto: the GPU's hardware decoder (NVDEC) where there is one, and PyAV beside it; pyav: the CPU alone; "
        "nvdec: as auto, but an error without one. These give the same bytes. dali: NVIDIA DALI, whose colours are "
        "others, and so are the features; PyAV decodes what it does not take.",
    )
    parity: Literal["none", "reference"] = _flag(
        "none", "reference: the reference's pixels, and a tower in float16 or, the default on a CPU, float32."
    )
    shard: str | None = _flag(
        None,
        "i/n: begin with the i-th of n shares of the videos, counted from 1: in a Slurm "
        "job of --array=1-8, $SLURM_ARRAY_TASK_ID/8. torchrun's ranks divide a shard further.",
    )
    take_over: bool = _flag(
        True,
        "Once a share is done, do what other ranks, shards and runs on the same "
        "--clip_feat_path have not finished. False: where they do not see each other's files.",
    )
    max_failures: float = _flag(0.01, "Largest share of failed videos with exit code 0.", at_least=0, at_most=1)
    timeout: float = _flag(
        600.0,
        "Seconds after which a video's decoding is given up; a second more for each that it lasts, up to ten "
        "times as many.",
        above=0,
        at_most=10**8,
    )
    decode_workers: int | None = _flag(
        None,
        "Processes that decode ahead of the tower, which share the cores. Default: one for each core, at most 16.",
        at_least=1,
        at_most=1000,
    )

    @property
    def policy(self) -> Policy:
        return POLICIES[self.parity]


@dataclass(frozen=True)
class ChatConfig(_Checked):
    """Ask questions about videos."""

    model_name_or_path: str = field(metadata={"help": "Folder of the language model and tokenizer."})
    projector: str | None = _flag(
        None, "Trained projector: .bin, .safetensors, a checkpoint folder, or the --output_dir of its training."
    )
    adapter: str | None = _flag(
        None,
        "LoRA adapter: a folder in PEFT's format, a checkpoint folder, or an --output_dir. Default: the one beside "
        "--projector.",
    )
    video: str | None = _flag(None, "A video, a feature file, or a folder of either.")
    question: list[str] = _flag([], "Questions (repeat the flag, or several after one).")
    questions_file: str | None = _flag(
        None,
        "JSONL or JSON of {video, question}, or a question file of the reference's benchmarks; answers are "
        "printed as JSONL, a line for each record.",
    )
    vision_tower: str | None = _flag(
        None,
        "Vision tower (hub id or folder). Default: the one that made the features the weights were trained on, "
        "or the model's own setting.",
    )
    conv_mode: Literal["pg-video-llava", "video-chatgpt_v1", "vicuna_v1_1", "chat_template"] | None = _flag(
        None,
        "System text and template of the prompt. Default: as the weights were trained; where they do not tell "
        "pg-video-llava, as the reference asks, or the model's chat_template.",
    )
    question_order: Literal["reference", "video_first"] | None = _flag(
        None,
        "Where the video stands in the prompt; reference: after the question. Default: as the weights were "
        "trained; reference where they do not tell.",
    )
    mm_use_vid_start_end: bool | None = _flag(None, "Default: as the tokenizer or the projector file says.")
    temperature: float = _flag(0.0, "0 is greedy; the reference samples at 0.2.", at_least=0, at_most=1000)
    max_new_tokens: int = _flag(1024, "Longest answer.", at_least=1)
    num_frames: int | None = _flag(
        None,
        "Frames per video, and temporal rows of the features. Default: as the weights were trained; 100 where "
        "they do not tell.",
        at_least=1,
        at_most=100_000,
    )
    bf16: bool = _flag(False, "Compute in bf16.")
    device: str | None = _flag(None, "torch device. Default: a GPU if there is one.")
    seed: int = _flag(0, "Seed of sampling.", at_least=0, at_most=2**63 - 1)


@dataclass(frozen=True)
class EvaluateConfig(_Checked):
    """Answer a benchmark's questions, and have the answers judged."""

    output: str = field(
        metadata={
            "help": "Folder of predictions, judgements and scores; a run that was killed goes on there.",
            "writes": "folder",
        }
    )
    task: Literal["vcg", "vcg_diverse", "activitynet_qa", "msvd_qa", "msrvtt_qa", "tgif_qa", "mc", "match"] | None = (
        _flag(
            None, "The benchmark; mc: any multiple choice (MVBench, Video-MME); match: short answers, compared as text."
        )
    )
    annotations: str | None = _flag(None, "The benchmark's own file, or the folder of its files.")
    video: str | None = _flag(None, "Folder of its videos, or of their feature files.")
    compare: str | None = _flag(None, "Another --output whose scores are set against these.")
    parity: Literal["reference"] | None = _flag(
        None, "reference: also write and score the judge's replies as upstream's scripts do."
    )
    model_name_or_path: str | None = _flag(
        None,
        "Folder of the language model and tokenizer. Without it, predictions that are there are judged.",
        group="predictions",
    )
    projector: str | None = _flag(None, "Trained projector: as for chat.")
    adapter: str | None = _flag(None, "LoRA adapter: as for chat.")
    vision_tower: str | None = _flag(None, "Vision tower (hub id or folder): as for chat.")
    conv_mode: Literal["pg-video-llava", "video-chatgpt_v1", "vicuna_v1_1", "chat_template"] | None = _flag(
        None, "System text and template of the prompt: as for chat."
    )
    question_order: Literal["reference", "video_first"] | None = _flag(
        None, "Where the video stands in the prompt: as for chat."
    )
    mm_use_vid_start_end: bool | None = _flag(None, "Default: as the tokenizer or the projector file says.")
    temperature: float = _flag(0.0, "0 is greedy; the reference samples at 0.2.", at_least=0, at_most=1000)
    max_new_tokens: int = _flag(1024, "Longest answer.", at_least=1)
    num_frames: int | None = _flag(None, "Frames per video: as for chat.", at_least=1, at_most=100_000)
    bf16: bool = _flag(False, "Compute in bf16.")
    device: str | None = _flag(None, "torch device. Default: a GPU if there is one, under torchrun the rank's own.")
    seed: int = _flag(0, "Seed of sampling.", at_least=0, at_most=2**63 - 1)
    at_once: int = _flag(32, "Most answers that are continued together.", at_least=1, at_most=4096)
    kv_cache_gib: float | None = _flag(
        None,
        "Memory for keys and values. Default: seven tenths of what a GPU has free; 4 GiB on a CPU.",
        above=0,
        at_most=10**6,
    )
    judge: str | None = _flag(
        None, "URL of an interface like OpenAI's, such as http://localhost:8000/v1.", group="judgements"
    )
    judge_model: str | None = _flag(None, "The judge's name there.")
    judge_key_variable: str = _flag(
        "OPENAI_API_KEY", "Environment variable that holds the judge's key, if it wants one."
    )
    judge_at_once: int = _flag(8, "Requests that wait for the judge together.", at_least=1, at_most=256)
    judge_timeout: float = _flag(60.0, "Seconds after which a reply is given up.", above=0, at_most=10**5)
    judge_retries: int = _flag(
        5, "Times that a request is repeated that met 429, 5xx or no connection.", at_least=0, at_most=100
    )


@dataclass(frozen=True)
class ServeConfig(_Checked):
    """Answer questions about videos over HTTP, as OpenAI's chat completions."""

    model_name_or_path: str = field(metadata={"help": "Folder of the language model and tokenizer."})
    projector: str | None = _flag(None, "Trained projector: as for chat.")
    adapter: str | None = _flag(None, "LoRA adapter: as for chat.")
    vision_tower: str | None = _flag(None, "Vision tower (hub id or folder): as for chat.")
    conv_mode: Literal["pg-video-llava", "video-chatgpt_v1", "vicuna_v1_1", "chat_template"] | None = _flag(
        None, "System text and template of the prompt: as for chat."
    )
    question_order: Literal["reference", "video_first"] | None = _flag(
        None, "Where the video stands in the prompt: as for chat."
    )
    mm_use_vid_start_end: bool | None = _flag(None, "Default: as the tokenizer or the projector file says.")
    temperature: float = _flag(0.0, "Of requests that name none; 0 is greedy.", at_least=0, at_most=2)
    max_new_tokens: int = _flag(1024, "Longest answer, whatever a request asks for.", at_least=1)
    num_frames: int | None = _flag(None, "Frames per video: as for chat.", at_least=1, at_most=100_000)
    bf16: bool = _flag(False, "Compute in bf16.")
    device: str | None = _flag(None, "torch device. Default: a GPU if there is one.")
    host: str = _flag("127.0.0.1", "Address to listen at; 0.0.0.0: every network of this machine.", group="server")
    port: int = _flag(8000, "Port to listen at; 0: any that is free.", at_least=0, at_most=65535)
    served_model_name: str | None = _flag(None, "The model's name in requests. Default: its folder's.")
    api_key: str | None = _flag(
        None,
        "Key that requests must bring. Default: FASTVID_API_KEY, which a list of processes does not show; none if "
        "that is not set.",
    )
    allowed_folder: str | None = _flag(None, "Folder whose files requests may name by file:// addresses.")
    allow_host: list[str] = _flag([], "Hosts (name, or name:port) whose videos requests may name by http(s) addresses.")
    demo: bool = _flag(False, "Serve a page to try the model, at the server's address.")
    at_once: int = _flag(32, "Most answers that are continued together.", at_least=1, at_most=4096, group="limits")
    max_waiting: int = _flag(256, "Requests that may wait beside those; more are refused with 429.", at_least=0)
    kv_cache_gib: float | None = _flag(
        None,
        "Memory for keys and values. Default: seven tenths of what a GPU has free; 4 GiB on a CPU.",
        above=0,
        at_most=10**6,
    )
    feature_cache_mib: int = _flag(1024, "Memory for features of videos that were asked about.", at_least=0)
    max_body_mib: int = _flag(128, "Largest request.", at_least=1, at_most=4096)
    max_video_mib: int = _flag(1024, "Largest video of a file:// or http(s) address.", at_least=1)
    max_pixels: int = _flag(8192 * 4320, "Most pixels of a picture.", at_least=1)
    max_frames: int = _flag(1_000_000, "Most frames of a video, and most pictures of a request.", at_least=1)
    max_seconds: float = _flag(4 * 3600.0, "Longest video.", above=0, at_most=10**7)
    decode_timeout: float = _flag(
        60.0, "Seconds, beside a video's own length, after which its decoding is given up.", above=0, at_most=10**5
    )
    request_timeout: float = _flag(600.0, "Seconds after which a request is given up.", above=0, at_most=10**6)
    grace: float = _flag(
        30.0, "Seconds that a server which is told to end gives its answers.", at_least=0, at_most=10**5
    )


@dataclass(frozen=True)
class ExportConfig(_Checked):
    """A checkpoint to the reference's or Hugging Face's format."""

    checkpoint: str = field(metadata={"help": "checkpoint-N folder, or an output_dir (its newest checkpoint)."})
    output: str = field(metadata={"help": "File (projector) or folder (peft, llama, llava) to write."})
    format: Literal["projector", "peft", "llama", "llava"] | None = _flag(
        None,
        "projector, the default: mm_projector.bin or .safetensors by ending; peft: a LoRA adapter, which PEFT "
        "loads, and the projector; llama: LLaVA-1.5 layout that LlamaForCausalLM loads; llava: "
        "LlavaForConditionalGeneration.",
    )
    merge: bool = _flag(
        False, "Merge a LoRA adapter into the model: --format llama, where no other is given. llava merges it too."
    )
    model_name_or_path: str | None = _flag(None, "Starting weights. Default: those the checkpoint was trained from.")
    vision_tower: str | None = _flag(
        None, "Tower to include (format llava). Default: the one that made the features of the training."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = _flag("float32", "Precision of the exported weights.")


@dataclass(frozen=True)
class DoctorConfig(_Checked):
    """What this machine has, and what each absence costs."""

    path: list[str] = _flag(["."], "Folders whose free disk space to show. Default: the current one.")
    json: bool = _flag(False, "Print JSON.")
