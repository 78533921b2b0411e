"""What every command accepts: one frozen dataclass per command. `fastvid.flags` fills them.

Flags keep the names of the reference's command line (and so of transformers' ``TrainingArguments``) wherever the
reference has one.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Policy:
    """Everything that ``--parity reference`` decides. Read where a value applies; nothing else asks about parity.

    Attributes:
        mask_by_retokenizing: labels are found as the reference finds them, by re-tokenizing prefixes, which masks a
            whole sample when the count disagrees. Otherwise labels come from the template's own spans.
        mean_of_means: loss = mean over ranks and micro-batches of each one's token mean. Otherwise the sum over
            supervised tokens divided by their global count.
        reference_order: samples come in the order of Hugging Face's Trainer 4.28, which depends on the number of ranks,
            with a short last batch in each epoch. Otherwise in one stream that does not.
        fp32_residual: under ``--bf16`` the residual stream stays fp32, as autocast leaves it. Otherwise it is bf16.
        tune_tables_without_start_end: adapter tuning without start and end tokens also trains the embedding table
            and the head (the reference does so by accident). Otherwise the projector alone.
        plain_products: matrices are multiplied as torch does it. Otherwise also as sums of another order.
        one_video_length: every video must have as many rows as the first. Otherwise each has what its file holds.
    """

    mask_by_retokenizing: bool
    mean_of_means: bool
    reference_order: bool
    fp32_residual: bool
    tune_tables_without_start_end: bool
    plain_products: bool
    one_video_length: bool


POLICIES = {"none": Policy(*[False] * 7), "reference": Policy(*[True] * 7)}


def _flag(default, help, **metadata):
    """A dataclass field with its ``--help`` text."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class DataConfig:
    """What decides the token ids and labels of a sample; shared by training, inspection and validation."""

    model_name_or_path: str = field(metadata={"help": "Folder of the starting weights and tokenizer."})
    data_path: list[str] = field(metadata={"help": "Training JSON or JSONL; several files, or the flag again, add up."})
    version: str = _flag("v1", "Conversation template: v1 (= vicuna_v1_1).")
    video_folder: str | None = _flag(None, "Folder that the records' `video` fields are relative to.")
    mm_use_vid_start_end: bool = _flag(False, "Put <vid_start> and <vid_end> around a video's tokens.")
    model_max_length: int = _flag(2048, "Longest sample in tokens, video tokens and BOS included.")
    num_video_tokens: int | None = _flag(None, "Rows that every video must have. Default: its feature file's own.")
    vision_tower: str | None = _flag(None, "CLIP tower (folder or hub id). Default: the model's own setting.")
    question_order: Literal["reference", "video_first"] = _flag(
        "reference", 'video_first: "question\\n<video>" becomes "<video>\\nquestion", for --share_video to share more.')
    parity: Literal["none", "reference"] = _flag("none", "reference: compute exactly what PG-Video-LLaVA computes.")

    @property
    def policy(self) -> Policy:
        return POLICIES[self.parity]


@dataclass(frozen=True)
class TrainConfig(DataConfig):
    """``fastvid.train``: the reference's training flags and fastvid's own."""

    output_dir: str = field(kw_only=True, metadata={"help": "Checkpoints, metrics and the final weights go here."})
    # data
    data_weights: list[float] = _flag([], "Passes over each --data_path file per epoch (fractions sample).")
    eval_data_path: list[str] = _flag([], "Validation JSON or JSONL.")
    lazy_preprocess: bool | None = _flag(None, "Accepted, not needed: samples are always tokenized when needed.")
    share_video: bool = _flag(False, "Keep a video's samples together and compute the rows they have in common once.")
    dataloader_num_workers: int = _flag(2, "Processes that read and pack ahead of the step; 0 does so in line.")
    on_bad_sample: Literal["error", "skip"] = _flag(
        "error", "Records that cannot be trained on, found at start-up (malformed, of images or audio, without an "
        "answer, without features): end the run, or skip leaves them out. What shows only when a sample is read "
        "(damaged features, a video that --model_max_length cuts) is skipped and told either way: --max_skipped.")
    max_skipped: float = _flag(
        0.25, "Largest share of samples that may be skipped while training; the run ends where there are more.")
    # what is trained
    tune_mm_mlp_adapter: bool = _flag(False, "Train the projector and the start/end embeddings only.")
    freeze_backbone: bool = _flag(False, "Freeze the decoder; train the embedding table and the head.")
    freeze_mm_mlp_adapter: bool = _flag(False, "Freeze the projector.")
    pretrain_mm_mlp_adapter: str | None = _flag(None, "Projector weights to start from (.bin or .safetensors).")
    mm_projector_type: Literal["linear", "mlp2x_gelu"] | None = _flag(None, "Default: as the model's config says.")
    # precision and memory
    bf16: bool = _flag(False, "Compute in bf16 over --master_dtype weights; without it everything is fp32.")
    master_dtype: Literal["float32", "bfloat16"] = _flag(
        "float32", "Trained matrices as stored: float32 masters, or bfloat16 with stochastic rounding (--bf16).")
    frozen_dtype: Literal["auto", "fp8", "int8", "nf4"] = _flag(
        "auto", "A frozen decoder's matrices. auto: as computed with; fp8: for a GPU's FP8 units (Ada, Hopper and "
        "later), for speed; int8 (half of bf16's bytes) and nf4 (a quarter, needs bitsandbytes): for memory.")
    tf32: bool = _flag(False, "Allow TF32 matrix products for fp32 work on Ampere and later.")
    gradient_checkpointing: bool = _flag(False, "Accepted: means --recompute auto.")
    recompute: str = _flag("auto", "Recompute activations in backward: none, selective (not matrix products), full, K "
                           "(the first K layers); auto: as few layers as the memory estimate needs to fit.")
    shard: Literal["auto", "full", "hybrid", "none"] = _flag(
        "auto", "FSDP2 sharding over ranks; auto shards what is trained and replicates a frozen backbone that fits; "
        "hybrid shards all over --shard_size ranks and keeps a copy on each such group.")
    shard_size: int | None = _flag(None, "Ranks that hold one copy of the model (--shard hybrid). Default: a node's.")
    ddp_timeout: int = _flag(1200, "Seconds after which a rank that lives but hangs ends the job.")
    attn_implementation: Literal["auto", "flash", "varlen", "avx512", "blocked", "sdpa"] = _flag(
        "auto", "Attention: flash-attn, torch's varlen, ours for bf16 on CPUs (avx512, blocked), or torch's SDPA.")
    # optimisation
    num_train_epochs: float = _flag(3.0, "Passes over the data.")
    max_steps: int = _flag(-1, "If positive, the number of optimizer steps; overrides --num_train_epochs.")
    per_device_train_batch_size: int = _flag(8, "Samples per rank and micro-batch.")
    rows_per_batch: int | None = _flag(
        None, "Rows per rank and micro-batch, packed full; instead of --per_device_train_batch_size.")
    per_device_eval_batch_size: int = _flag(8, "Samples per rank and validation batch.")
    gradient_accumulation_steps: int = _flag(1, "Micro-batches per optimizer step.")
    learning_rate: float = _flag(5e-5, "Peak learning rate.")
    weight_decay: float = _flag(0.0, "AdamW weight decay (not applied to biases and norms).")
    adam_beta1: float = _flag(0.9, "AdamW beta 1.")
    adam_beta2: float = _flag(0.999, "AdamW beta 2.")
    adam_epsilon: float = _flag(1e-8, "AdamW epsilon.")
    max_grad_norm: float = _flag(1.0, "Clip the global gradient norm to this; 0 does not clip.")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = _flag(
        "cosine", "Learning-rate schedule after warm-up.")
    warmup_ratio: float = _flag(0.0, "Warm-up steps as a share of all steps.")
    warmup_steps: int = _flag(0, "Warm-up steps; overrides --warmup_ratio when positive.")
    optim: Literal["adamw", "adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = _flag(
        "adamw", "adamw (adamw_torch is the reference's name for it); adamw_8bit keeps moments in 8 bits, in blocks of "
        "256; paged_adamw_8bit also lets them move to the host while the GPU is full (needs bitsandbytes).")
    seed: int = _flag(42, "Seed of the sample order and of new weights.")
    full_determinism: bool = _flag(False, "Deterministic CUDA kernels only; a CPU always is.")
    # logging, validation, saving
    evaluation_strategy: Literal["no", "steps", "epoch"] | None = _flag(None, "Older name of --eval_strategy.")
    eval_strategy: Literal["no", "steps", "epoch"] = _flag("no", "When to validate.")
    eval_steps: int = _flag(500, "Steps between validations.")
    logging_steps: int = _flag(10, "Steps between log lines.")
    save_strategy: Literal["no", "steps", "epoch"] = _flag("steps", "When to save a checkpoint.")
    save_steps: int = _flag(500, "Steps between checkpoints.")
    save_total_limit: int | None = _flag(None, "Keep this many newest checkpoints.")
    resume: Literal["auto", "never"] = _flag("auto", "auto: go on from the newest valid checkpoint in --output_dir.")
    report_to: list[str] = _flag(["tensorboard"], "tensorboard or none; metrics.jsonl is always written.")
    disable_tqdm: bool = _flag(False, "No progress bar.")
    peak_tflops: float | None = _flag(
        None, "Peak TFLOP/s of a device, against which utilisation (mfu) is stated. Default: a known GPU's dense bf16.")
    profile: bool = _flag(False, "Record three steps after three of warm-up into output_dir/profile: a trace of the "
                          "operators, and on a GPU what lies in its memory.")
    dry_run: bool = _flag(False, "Build everything, print the memory estimate, and stop before the first step.")

    @property
    def trainable(self) -> frozenset[str]:
        """The parts that get a gradient: of "projector", "boundary", "embed", "head" and "decoder".

        The reference's own table of flag combinations, but for adapter tuning without start and end tokens (Policy).
        """
        projector = set() if self.freeze_mm_mlp_adapter else {"projector"}
        if self.tune_mm_mlp_adapter and self.mm_use_vid_start_end:
            return frozenset(projector | {"boundary"})
        if self.tune_mm_mlp_adapter:
            return frozenset(projector | ({"embed", "head"} if self.policy.tune_tables_without_start_end else set()))
        if self.freeze_backbone:
            return frozenset({"embed", "head"})
        return frozenset(projector | {"embed", "head", "decoder"})


@dataclass(frozen=True)
class InspectConfig(TrainConfig):
    """``fastvid inspect``: takes the training command line; shows what the model will see."""

    output_dir: str = field(default="", kw_only=True, metadata={"help": "Ignored: accepted with a training command."})
    index: int | None = _flag(None, "Show this record only.")
    json: bool = _flag(False, "One JSON line per record.")


@dataclass(frozen=True)
class ConvertConfig:
    """``fastvid convert``: VideoInstruct JSON to training JSON."""

    input_json_file: str = field(metadata={"help": "VideoInstruct JSON or JSONL (records of q, a, video_id); or, with "
                                           "--clip_feature_path, a training JSON to filter."})
    output_json_file: str = field(metadata={"help": "Training JSON (or JSONL, by its ending)."})
    clip_feature_path: str | None = _flag(None, "Keep only records whose features lie in this folder.")
    on_bad: Literal["error", "drop"] = _flag("error", "What a malformed record does; drops are counted and listed.")


@dataclass(frozen=True)
class ValidateConfig(DataConfig):
    """``fastvid validate``: takes the data flags of the training command; checks records and feature files."""

    model_name_or_path: str | None = field(default=None, kw_only=True, metadata={
        "help": "Folder whose tokenizer tells which samples --model_max_length cuts (with --video_folder). Default: "
                "none, and tokens are not counted."})
    quick: bool = _flag(
        False, "Read the headers of feature files only, not their values, which may be NaN; count no tokens.")


@dataclass(frozen=True)
class ExtractConfig:
    """``fastvid extract``: videos to feature files."""

    video_dir_path: str = field(metadata={"help": "Folder of videos (sub-folders included)."})
    clip_feat_path: str = field(metadata={"help": "Folder that receives one feature file per video."})
    infer_batch: int = _flag(32, "Most frames per pass of the tower; passes are evened out.")
    llava: Literal["1.1", "1.5"] = _flag("1.5", "1.1: 224-pixel tower (Video-ChatGPT); 1.5: 336-pixel.")
    vision_tower: str | None = _flag(None, "CLIP tower (hub id or folder). Default: the one that --llava names.")
    format: Literal["safetensors", "pkl"] = _flag("safetensors", "pkl: the reference's format.")
    num_frames: int = _flag(100, "Frames per video, and temporal rows of the features.")
    dtype: Literal["float16", "bfloat16", "float32"] | None = _flag(
        None, "Precision of the tower. Default: float16 on a GPU, float32 on a CPU.")
    device: str | None = _flag(None, "torch device. Default: a GPU if there is one.")
    max_failures: float = _flag(0.01, "Largest share of failed videos with exit code 0.")
    timeout: float = _flag(600.0, "Seconds after which a video's decoding is given up.")
    decode_workers: int | None = _flag(None, "Decoders that run ahead of the tower. Default: one per four cores.")


@dataclass(frozen=True)
class ChatConfig:
    """``fastvid chat``: questions about videos."""

    model_name_or_path: str = field(metadata={"help": "Folder of the language model and tokenizer."})
    projector: str | None = _flag(None, "Trained projector (.bin, .safetensors or a checkpoint folder).")
    video: str | None = _flag(None, "A video, a feature file, or a folder of either.")
    question: list[str] = _flag([], "Questions (repeat the flag, or several after one).")
    questions_file: str | None = _flag(None, "JSONL of {video, question}; answers are printed as JSONL.")
    vision_tower: str | None = _flag(None, "CLIP tower (hub id or folder). Default: the model's own setting.")
    conv_mode: Literal["pg-video-llava", "video-chatgpt_v1", "vicuna_v1_1"] = _flag(
        "pg-video-llava", "System text and template of the prompt.")
    question_order: Literal["reference", "video_first"] = _flag(
        "reference", "Where the video stands in the prompt; reference: after the question. As the model was trained.")
    mm_use_vid_start_end: bool | None = _flag(None, "Default: as the tokenizer or the projector file says.")
    temperature: float = _flag(0.0, "0 is greedy; the reference samples at 0.2.")
    max_new_tokens: int = _flag(1024, "Longest answer.")
    num_frames: int = _flag(100, "Frames per video, and temporal rows of the features.")
    bf16: bool = _flag(False, "Compute in bf16.")
    device: str | None = _flag(None, "torch device. Default: a GPU if there is one.")
    seed: int = _flag(0, "Seed of sampling.")


@dataclass(frozen=True)
class ExportConfig:
    """``fastvid export``: a checkpoint to the reference's or Hugging Face's format."""

    checkpoint: str = field(metadata={"help": "checkpoint-N folder, or an output_dir (its newest checkpoint)."})
    output: str = field(metadata={"help": "File (projector) or folder (llama, llava) to write."})
    format: Literal["projector", "llama", "llava"] = _flag(
        "projector", "projector: mm_projector.bin or .safetensors by ending; llama: LLaVA-1.5 layout that "
        "LlamaForCausalLM loads; llava: LlavaForConditionalGeneration.")
    model_name_or_path: str | None = _flag(None, "Starting weights. Default: those the checkpoint was trained from.")
    vision_tower: str | None = _flag(None, "Tower to include (format llava). Default: the model's own setting.")
    dtype: Literal["float32", "bfloat16", "float16"] = _flag("float32", "Precision of the exported weights.")


@dataclass(frozen=True)
class DoctorConfig:
    """``fastvid doctor``: what this machine has, and what each absence costs."""

    path: list[str] = _flag(["."], "Folders whose free disk space to show.")
    json: bool = _flag(False, "Print JSON.")
