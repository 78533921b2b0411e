"""What commands accept that read a training set."""

from dataclasses import dataclass, field
from typing import Literal

from fastvid.config.fields import Checked, flag, steps
from fastvid.config.policy import POLICIES, Lora, Policy, Trainable
from fastvid.config.pooling import check_spec

DEFAULT_BATCH = 8  # samples per rank and micro-batch


@dataclass(frozen=True)
class DataConfig(Checked):
    """What decides the token ids and labels of a sample; shared by training, inspection and validation."""

    model_name_or_path: str = field(metadata={"help": "Folder of the starting weights and tokenizer."})
    data_path: list[str] = field(
        metadata={"help": "Training JSON, JSONL or Parquet; several files, or the flag again, add up."}
    )
    version: str = flag(
        "auto",
        "Conversation template: v1 (= vicuna_v1_1), for tokenizers of LLaMA 2's kind; chat_template, the model's own, "
        "for the others. auto: as the tokenizer is.",
        group="data and model",
    )
    video_folder: str | None = flag(
        None,
        "Folder that the records' `video` fields are relative to: of feature files, or of videos, whose features "
        "training makes.",
    )
    video_folder_2: str | None = flag(
        None,
        "Folder of a second vision tower's feature files, of the names in --video_folder, or of the videos, whose "
        "features training makes. Its rows follow the first tower's, through a projector of its own.",
    )
    mm_use_vid_start_end: bool = flag(False, "Put <vid_start> and <vid_end> around a video's tokens.")
    model_max_length: int = flag(2048, "Longest sample in tokens, video tokens and BOS included.", at_least=1)
    num_video_tokens: int | None = flag(
        None, "Rows that every video must have. Default: its feature file's own.", at_least=1
    )
    vision_tower: str | None = flag(
        None,
        "Vision tower (folder or hub id); it makes the features of videos in --video_folder that have none. "
        "Default: the model's own setting.",
    )
    vision_tower_2: str | None = flag(
        None,
        "Second vision tower: the same for --video_folder_2. Default: that of the weights that training starts from.",
    )
    num_frames: int | None = flag(
        None,
        "Frames of each video that has no features yet, and temporal rows of those that are made. Default: as the "
        "weights that training starts from were trained; 100 where they do not tell. A second tower keeps its own "
        "where they tell it.",
        at_least=1,
        at_most=100_000,
    )
    pooling: str | None = flag(
        None,
        "What the rows are of each video that has no features yet, as for extract. Default: as the weights that "
        "training starts from were trained; temporal+spatial where they do not tell.",
        check=check_spec,
    )
    clip_feat_path: str | None = flag(
        None,
        "Folder that receives the features of videos in --video_folder that have none, as fastvid extract writes "
        "them; those in it are used. Default: `features` in --output_dir. A second tower's go to the same with _2 at "
        "its end.",
        writes="folder",
    )
    question_order: Literal["reference", "video_first"] = flag(
        "reference", 'video_first: "question\\n<video>" becomes "<video>\\nquestion", for --share_video to share more.'
    )
    parity: Literal["none", "reference"] = flag("none", "reference: compute exactly what PG-Video-LLaVA computes.")

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
    data_weights: list[float] = flag(
        [], "Passes over each --data_path file per epoch (fractions sample).", at_least=0, at_most=10**6
    )
    eval_data_path: list[str] = flag([], "Validation JSON, JSONL or Parquet; when: --eval_strategy.")
    eval_tasks: list[str] = flag(
        [],
        "Benchmarks of fastvid evaluate that are asked when validating, each as TASK=ANNOTATIONS; predictions lie in "
        "output_dir/eval_tasks.",
    )
    eval_video_folder: str | None = flag(None, "Folder of the feature files of their videos. Default: --video_folder.")
    eval_video_folder_2: str | None = flag(None, "The second vision tower's. Default: --video_folder_2.")
    eval_max_new_tokens: int = flag(128, "Longest answer to them.", at_least=1)
    eval_kv_cache_gib: float = flag(
        4.0, "Memory for keys and values of their answers, beside what a step takes.", above=0, at_most=10**6
    )
    lazy_preprocess: bool | None = flag(None, "Accepted, not needed: samples are always tokenized when needed.")
    share_video: bool = flag(
        False, "Keep a video's samples together and compute the tokens that they have in common once."
    )
    dataloader_num_workers: int = flag(
        2, "Processes that read and pack ahead of the step; 0 does so in line.", at_least=0, at_most=1000
    )
    on_bad_sample: Literal["error", "skip"] = flag(
        "error",
        "Records that cannot be trained on, found at start-up (malformed, of images or audio, without an "
        "answer, without features): end the run, or skip leaves them out. What shows only when a sample is read "
        "(damaged features, a video that --model_max_length cuts) is skipped and told either way: --max_skipped.",
    )
    max_skipped: float = flag(
        0.25,
        "Largest share of samples that may be skipped while training; the run ends where there are more.",
        at_least=0,
        at_most=1,
    )
    tune_mm_mlp_adapter: bool = flag(
        False, "Train the projector and the start/end embeddings only.", group="what is trained"
    )
    freeze_backbone: bool = flag(False, "Freeze the decoder; train the embedding table and the head.")
    freeze_mm_mlp_adapter: bool = flag(False, "Freeze the projector.")
    pretrain_mm_mlp_adapter: str | None = flag(
        None, "Projector to start from: .bin, .safetensors, a checkpoint folder or the --output_dir of its training."
    )
    mm_projector_type: Literal["linear", "mlp2x_gelu"] | None = flag(None, "Default: as the model's config says.")
    lora_enable: bool = flag(
        False, "Train LoRA's matrices beside a frozen decoder's, the projector and the start/end embeddings."
    )
    lora_r: int = flag(128, "Rank of LoRA's matrices.", at_least=1, at_most=10_000)
    lora_alpha: float = flag(256.0, "LoRA's products are scaled by alpha / r.", above=0, at_most=10**6)
    lora_dropout: float = flag(0.05, "Share of the values that LoRA's matrices do not see.", at_least=0, below=1)
    lora_targets: list[str] = flag(
        ["all"],
        "Matrices that get them: all, attention, mlp, or names (q_proj k_proj v_proj o_proj gate_proj up_proj "
        "down_proj).",
    )
    lora_weights: str | None = flag(
        None, "LoRA adapter to start from: a folder in PEFT's format, a checkpoint folder, or an --output_dir."
    )
    use_rslora: bool = flag(False, "Scale by alpha / √r instead.")
    bf16: bool = flag(
        False,
        "Compute in bf16 over --master_dtype weights; without it everything is fp32.",
        group="precision and memory",
    )
    master_dtype: Literal["float32", "bfloat16"] = flag(
        "float32", "Trained matrices as stored: float32 masters, or bfloat16 with stochastic rounding (--bf16)."
    )
    frozen_dtype: Literal["auto", "fp8", "int8", "nf4"] = flag(
        "auto",
        "A frozen decoder's matrices. auto: as computed with; fp8: for a GPU's FP8 units (Ada, Hopper and "
        "later), for speed; int8 (half of bf16's bytes) and nf4 (a quarter, needs bitsandbytes): for memory.",
    )
    tf32: bool = flag(False, "Allow TF32 matrix products for fp32 work on Ampere and later.")
    gradient_checkpointing: bool = flag(False, "Accepted: means --recompute auto.")
    recompute: str = flag(
        "auto",
        "Recompute activations in backward: none, selective (not matrix products), full, K "
        "(the first K layers); auto: as few layers as the memory estimate needs to fit.",
    )
    shard: Literal["auto", "full", "hybrid", "none"] = flag(
        "auto",
        "FSDP2 sharding over ranks; auto shards what is trained and replicates a frozen backbone that fits; "
        "hybrid shards all over --shard_size ranks and keeps a copy on each such group.",
    )
    shard_size: int | None = flag(
        None, "Ranks that hold one copy of the model (--shard hybrid). Default: a node's.", at_least=1
    )
    reduce_dtype: Literal["float32", "bfloat16"] = flag(
        "float32",
        "What gradients are sent between ranks in, and summed over them. bfloat16 sends half the bytes, and rounds: "
        "results differ a little, also between numbers of ranks.",
    )
    ddp_timeout: int = flag(1200, "Seconds after which a rank that lives but hangs ends the job.", at_least=1)
    attn_implementation: Literal["auto", "flash", "varlen", "avx512", "sdpa"] = flag(
        "auto", "Attention: flash-attn, torch's varlen, ours for bf16 on CPUs (avx512), or torch's SDPA."
    )
    num_train_epochs: float = flag(3.0, "Passes over the data.", above=0, at_most=10**6, group="optimisation")
    max_steps: int = flag(-1, "If positive, the number of optimizer steps; overrides --num_train_epochs.", at_least=-1)
    per_device_train_batch_size: int | None = flag(
        None,
        "Samples per rank and micro-batch. Default: 8, or fewer in as many more micro-batches where memory is too "
        "short for them; a run that goes on has those that it began with.",
        at_least=1,
        at_most=10_000,
    )
    tokens_per_batch: int | Literal["auto"] | None = flag(
        None,
        "Tokens per rank and micro-batch, packed full; instead of --per_device_train_batch_size. auto: as many as "
        "fill cards of 80 GB and more; a run that goes on has those that it began with.",
        at_least=1,
        was="rows_per_batch",
    )
    per_device_eval_batch_size: int = flag(8, "Samples per rank and validation batch.", at_least=1, at_most=10_000)
    gradient_accumulation_steps: int = flag(1, "Micro-batches per optimizer step.", at_least=1, at_most=10_000)
    learning_rate: float = flag(5e-5, "Peak learning rate.", at_least=0, at_most=100)
    mm_projector_lr: float | None = flag(
        None, "Peak learning rate of the projector. Default: --learning_rate.", at_least=0, at_most=100
    )
    neftune_noise_alpha: float | None = flag(
        None,
        "NEFTune: add uniform noise within ± this / √(tokens · channels) to text's embeddings; tokens of a "
        "micro-batch's longest sample.",
        above=0,
        at_most=10**6,
    )
    weight_decay: float = flag(0.0, "AdamW weight decay (not applied to biases and norms).", at_least=0, at_most=100)
    adam_beta1: float = flag(0.9, "AdamW beta 1.", at_least=0, below=1)
    adam_beta2: float = flag(0.999, "AdamW beta 2.", at_least=0, below=1)
    adam_epsilon: float = flag(1e-8, "AdamW epsilon.", at_least=1e-30, at_most=1)
    max_grad_norm: float = flag(
        1.0, "Clip the global gradient norm to this; 0 does not clip.", at_least=0, at_most=10**9
    )
    lr_scheduler_type: Literal[
        "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_min_lr", "warmup_stable_decay"
    ] = flag("cosine", "Learning-rate schedule after warm-up.")
    ema_decay: float | None = flag(
        None,
        "Average what is trained over the steps, exponentially; validation, results and exports take the average. "
        "0.999 looks back about 1,000 steps.",
        above=0,
        below=1,
    )
    min_lr_ratio: float = flag(
        0.0,
        "Where cosine_with_min_lr and warmup_stable_decay end, as a share of --learning_rate.",
        at_least=0,
        at_most=1,
    )
    decay_steps: int | float = steps(0.1, "The last steps of warmup_stable_decay, in which the rate falls", at_least=0)
    warmup_ratio: float = flag(0.0, "Warm-up steps as a share of all steps.", at_least=0, at_most=1)
    warmup_steps: int | float = steps(0, "Warm-up steps; overrides --warmup_ratio when positive", at_least=0)
    optim: Literal["adamw", "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = flag(
        "adamw",
        "adamw (adamw_torch and adamw_torch_fused are other names for it); adamw_8bit keeps moments in 8 "
        "bits, in blocks of 256; paged_adamw_8bit also lets them move to the host while the GPU is full (needs "
        "bitsandbytes).",
    )
    seed: int = flag(42, "Seed of the sample order and of new weights.", at_least=0, at_most=2**63 - 1)
    full_determinism: bool = flag(False, "Deterministic CUDA kernels only; a CPU always is.")
    evaluation_strategy: Literal["no", "steps", "epoch"] | None = flag(
        None, "Older name of --eval_strategy.", group="validation, saving, logging"
    )
    eval_strategy: Literal["auto", "no", "steps", "epoch"] = flag(
        "auto", "When to validate. auto: after each epoch where there is --eval_data_path or --eval_tasks."
    )
    eval_steps: int | float = steps(500, "Steps between validations", above=0)
    logging_steps: int | float = steps(10, "Steps between log lines", above=0)
    save_strategy: Literal["no", "steps", "epoch"] = flag("steps", "When to save a checkpoint.")
    save_steps: int | float = steps(500, "Steps between checkpoints", above=0)
    save_total_limit: int | None = flag(None, "Keep this many newest checkpoints.", at_least=1)
    resume: Literal["auto", "never"] = flag("auto", "auto: go on from the newest valid checkpoint in --output_dir.")
    report_to: list[str] = flag(
        ["tensorboard"],
        "tensorboard, wandb, mlflow, trackio; all (those that are installed) or none. metrics.jsonl is always written.",
    )
    run_name: str | None = flag(
        None, "Name of the run where it is reported and in loss_curve.png. Default: that of --output_dir."
    )
    project: str | None = flag(
        None,
        "Project (wandb, trackio) or experiment (mlflow) that the run belongs to. "
        "Default: as their own variables say, else fastvid.",
    )
    disable_tqdm: bool = flag(False, "No progress bar.")
    peak_tflops: float | None = flag(
        None,
        "Peak TFLOP/s of a device, against which utilisation (mfu) is stated. Default: a known GPU's dense bf16.",
        above=0,
        at_most=10**9,
    )
    profile: bool = flag(
        False,
        "Record three steps after three of warm-up into output_dir/profile: the ten kernels that took "
        "most time, a trace, and on a GPU what lies in its memory.",
    )
    dry_run: bool = flag(
        False,
        "Check flags and files, print what would be trained and the memory it takes, and stop "
        "before the first step. The model's folder need not hold weights.",
    )
    memory: str | None = flag(None, "Plan as if each device had so much free memory: 24GiB, 80GB.")

    @property
    def batch_size(self) -> int:
        """`per_device_train_batch_size`, or its default."""
        return self.per_device_train_batch_size or DEFAULT_BATCH

    @property
    def token_budget(self) -> int | None:
        """`tokens_per_batch`, once what "auto" means is settled (`fastvid.training.budget`)."""
        assert self.tokens_per_batch != "auto"
        return self.tokens_per_batch

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
    index: int | None = flag(None, "Show this record only.", at_least=0, group="what is shown")
    json: bool = flag(False, "One JSON line per record.")
    html: str | None = flag(
        None,
        "A page of one record (--index) or of one video (--video): frames with their times, "
        "norms of the features, the prompt, what the header says.",
        writes="file",
    )
    video: str | None = flag(
        None,
        "A video or a feature file to show on the page, without --data_path; beside it, "
        "the record's video. With --vision_tower the features of a video are computed.",
    )
    video_dir_path: str | None = flag(None, "Folder of the videos that the record's frames are read from.")
    num_frames: int | None = flag(
        None,
        "Frames per video on the page, and of each video that has no features yet. Default: as the features' "
        "header says; 100 where it does not.",
        at_least=1,
        at_most=100_000,
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
    quick: bool = flag(
        False,
        "Read the headers of feature files only, not their values, which may be NaN; compare videos by their "
        "size alone; count no tokens.",
    )
    video_dir_path: str | None = flag(
        None,
        "Folder of the videos: those that were changed since their features were made are found (with --video_folder).",
        group="what is compared and written",
    )
    json: str | None = flag(None, "File that receives the whole report as JSON.", writes="file")
    drop: str | None = flag(
        None,
        "File that receives the records that nothing is wrong with, those of all --data_path files in their "
        "order; JSONL by its ending, else JSON.",
        writes="file",
    )
    overwrite: bool = flag(False, "Replace the files of --drop and --json where they are there already.")
