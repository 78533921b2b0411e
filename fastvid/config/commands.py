"""What the other commands accept."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from fastvid.config.fields import Checked, flag
from fastvid.config.policy import POLICIES, Policy
from fastvid.config.pooling import RECIPE, check_spec

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


@dataclass(frozen=True)
class ConvertConfig(Checked):
    """VideoInstruct's records, or other trainers', to training records."""

    input_json_file: str = field(
        metadata={
            "help": "JSON, JSONL or Parquet of VideoInstruct (q, a, video_id) or of another trainer (--from); or, with "
            "--clip_feature_path, training records to filter."
        }
    )
    output_json_file: str = field(metadata={"help": "Training JSON (or JSONL, by its ending).", "writes": "file"})
    clip_feature_path: str | None = flag(None, "Keep only records whose features lie in this folder.")
    from_: Style = flag("auto", "Style of the records. auto: each record's own; others are refused.")
    media_root: str | None = flag(
        None, "Folder that names of videos and images begin with, which is taken off: features lie by the rest."
    )
    on_bad: Literal["auto", "error", "drop"] = flag(
        "auto",
        "What a malformed record does; drops are counted and told. auto: an error where all records are the "
        "reference's (VideoInstruct's or training records), and a drop in other files.",
    )


@dataclass(frozen=True)
class ExtractConfig(Checked):
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
    infer_batch: int = flag(32, "Most frames per pass of the tower; passes are evened out.", at_least=1)
    llava: Literal["1.1", "1.5"] | None = flag(
        None, "1.1: 224-pixel tower (Video-ChatGPT); 1.5, the default: 336-pixel."
    )
    vision_tower: str | None = flag(None, "CLIP, SigLIP or DINO tower (hub id or folder). Default: as --llava says.")
    images: bool = flag(
        False,
        "Take images (.jpg, .png, .webp, .bmp, .tif) as well: each is a video of one frame, without temporal rows.",
    )
    follow_links: bool = flag(
        False,
        "Follow links in the folder of videos, to files and to folders, and lines of "
        "a list file that lead out of its folder.",
    )
    allow_damaged: bool = flag(
        False, "Take videos of which frames are missing or decode with errors; each one's header counts them."
    )
    overwrite: bool = flag(False, "Replace feature files that were made with other settings, or nobody knows which.")
    format: Literal["safetensors", "pkl"] = flag("safetensors", "pkl: the reference's format.")
    num_frames: int = flag(100, "Frames per video, and temporal rows of the features.", at_least=1, at_most=100_000)
    pooling: str = flag(
        RECIPE,
        "What a video's rows are. temporal+spatial: a mean of each frame, then one of each patch; grid:TxHxW: means "
        "over time, height and width; slow-fast:TxHxW+TxHxW: few frames at a fine grid, then all at a coarse one.",
        check=check_spec,
    )
    dtype: Literal["float16", "bfloat16", "float32"] | None = flag(
        None, "Precision of the tower. Default: float16 on a GPU; on a CPU bfloat16 if it multiplies that, or float32."
    )
    tower_dtype: Literal["auto", "fp8"] = flag(
        "auto",
        "fp8: the tower's matrices in FP8: faster on GPUs that have it (Ada, Hopper), slower on a CPU. The "
        "features change; the summary says by how much. auto: in --dtype.",
    )
    device: str | None = flag(None, "torch device. Default: a GPU if there is one.")
    decoder: Literal["auto", "pyav", "nvdec", "dali"] = flag(
        "auto",
        "auto: the GPU's hardware decoder (NVDEC) where there is one, and PyAV beside it; pyav: the CPU alone; "
        "nvdec: as auto, but an error without one. These give the same bytes. dali: NVIDIA DALI, whose colours are "
        "others, and so are the features; PyAV decodes what it does not take.",
    )
    parity: Literal["none", "reference"] = flag(
        "none", "reference: the reference's pixels, and a tower in float16 or, the default on a CPU, float32."
    )
    shard: str | None = flag(
        None,
        "i/n: begin with the i-th of n shares of the videos, counted from 1: in a Slurm "
        "job of --array=1-8, $SLURM_ARRAY_TASK_ID/8. torchrun's ranks divide a shard further.",
    )
    take_over: bool = flag(
        True,
        "Once a share is done, do what other ranks, shards and runs on the same "
        "--clip_feat_path have not finished. False: where they do not see each other's files.",
    )
    max_failures: float = flag(0.01, "Largest share of failed videos with exit code 0.", at_least=0, at_most=1)
    timeout: float = flag(
        600.0,
        "Seconds after which a video's decoding is given up; a second more for each that it lasts, up to ten "
        "times as many.",
        above=0,
        at_most=10**8,
    )
    decode_workers: int | None = flag(
        None,
        "Processes that decode ahead of the tower, which share the cores. Default: one for each core, at most 16.",
        at_least=1,
        at_most=1000,
    )

    @property
    def policy(self) -> Policy:
        return POLICIES[self.parity]


@dataclass(frozen=True)
class ExportConfig(Checked):
    """A checkpoint to the reference's or Hugging Face's format."""

    checkpoint: str = field(metadata={"help": "checkpoint-N folder, or an output_dir (its newest checkpoint)."})
    output: str = field(
        metadata={"help": "File (projector) or folder (peft, llama, llava) to write.", "writes": "file or folder"}
    )
    format: Literal["projector", "peft", "llama", "llava"] | None = flag(
        None,
        "projector, the default: mm_projector.bin or .safetensors by ending; peft: a LoRA adapter, which PEFT "
        "loads, and the projector; llama: LLaVA-1.5 layout that LlamaForCausalLM loads; llava: "
        "LlavaForConditionalGeneration.",
    )
    merge: bool = flag(
        False, "Merge a LoRA adapter into the model: --format llama, where no other is given. llava merges it too."
    )
    model_name_or_path: str | None = flag(None, "Starting weights. Default: those the checkpoint was trained from.")
    vision_tower: str | None = flag(
        None, "Tower to include (format llava). Default: the one that made the features of the training."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = flag("float32", "Precision of the exported weights.")
    push_to_hub: bool = flag(
        False, "Upload the files to the Hugging Face Hub, with a model card; `hf auth login` first."
    )
    hub_model_id: str | None = flag(None, "Repository on the hub, owner/name. Default: --output's name, below you.")
    hub_private_repo: bool = flag(False, "A repository that is made for it is private.")


@dataclass(frozen=True)
class DoctorConfig(Checked):
    """What this machine has, and what each absence costs."""

    path: list[str] = flag(["."], "Folders whose free disk space to show. Default: the current one.")
    json: bool = flag(False, "Print JSON.")
