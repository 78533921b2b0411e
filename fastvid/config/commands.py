"""What the other commands accept."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from fastvid.config.fields import Checked, flag
from fastvid.policy import POLICIES, Policy
from fastvid.pooling import RECIPE, check_spec

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
class ChatConfig(Checked):
    """Ask questions about videos."""

    model_name_or_path: str = field(metadata={"help": "Folder of the language model and tokenizer."})
    projector: str | None = flag(
        None, "Trained projector: .bin, .safetensors, a checkpoint folder, or the --output_dir of its training."
    )
    adapter: str | None = flag(
        None,
        "LoRA adapter: a folder in PEFT's format, a checkpoint folder, or an --output_dir. Default: the one beside "
        "--projector.",
    )
    video: str | None = flag(None, "A video, a feature file, or a folder of either.")
    video_2: str | None = flag(
        None,
        "Of weights that were trained with two vision towers: the second one's feature file where --video is one, or "
        "folder of them, under the same names.",
    )
    question: list[str] = flag([], "Questions (repeat the flag, or several after one).")
    questions_file: str | None = flag(
        None,
        "JSONL or JSON of {video, question}, or a question file of the reference's benchmarks; answers are "
        "printed as JSONL, a line for each record.",
    )
    vision_tower: str | None = flag(
        None,
        "Vision tower (hub id or folder). Default: the one that made the features the weights were trained on, "
        "or the model's own setting.",
    )
    vision_tower_2: str | None = flag(
        None, "Second vision tower, of weights that were trained with two. Default: as for --vision_tower."
    )
    conv_mode: Literal["pg-video-llava", "video-chatgpt_v1", "vicuna_v1_1", "chat_template"] | None = flag(
        None,
        "System text and template of the prompt. Default: as the weights were trained; where they do not tell "
        "pg-video-llava, as the reference asks, or the model's chat_template.",
    )
    question_order: Literal["reference", "video_first"] | None = flag(
        None,
        "Where the video stands in the prompt; reference: after the question. Default: as the weights were "
        "trained; reference where they do not tell.",
    )
    mm_use_vid_start_end: bool | None = flag(None, "Default: as the tokenizer or the projector file says.")
    temperature: float = flag(0.0, "0 is greedy; the reference samples at 0.2.", at_least=0, at_most=1000)
    max_new_tokens: int = flag(1024, "Longest answer.", at_least=1)
    num_frames: int | None = flag(
        None,
        "Frames per video, and temporal rows of the features. Default: as the weights were trained; 100 where "
        "they do not tell.",
        at_least=1,
        at_most=100_000,
    )
    pooling: str | None = flag(
        None,
        "What a video's rows are, as for extract. Default: as the weights were trained; temporal+spatial where they "
        "do not tell.",
        check=check_spec,
    )
    bf16: bool = flag(False, "Compute in bf16.")
    device: str | None = flag(None, "torch device. Default: a GPU if there is one.")
    seed: int = flag(0, "Seed of sampling.", at_least=0, at_most=2**63 - 1)


@dataclass(frozen=True)
class EmbedConfig(Checked):
    """Videos, or their features, to the rows that a language model reads."""

    model_name_or_path: str = field(metadata={"help": "Folder of the language model and tokenizer."})
    video: str = field(
        metadata={
            "help": "A video, a feature file, a folder of either (sub-folders included), or a list: a .txt file with a "
            "path on each line, relative to its folder."
        }
    )
    output: str = field(metadata={"help": "Folder that receives one .safetensors file per video.", "writes": "folder"})
    video_2: str | None = flag(None, "A second vision tower's feature file, or folder of them: as for chat.")
    projector: str | None = flag(None, "Trained projector: as for chat.")
    vision_tower: str | None = flag(None, "Vision tower (hub id or folder): as for chat.")
    vision_tower_2: str | None = flag(None, "Second vision tower: as for chat.")
    mm_use_vid_start_end: bool | None = flag(None, "Default: as the tokenizer or the projector file says.")
    num_frames: int | None = flag(None, "Frames per video: as for chat.", at_least=1, at_most=100_000)
    pooling: str | None = flag(None, "What a video's rows are: as for chat.", check=check_spec)
    bf16: bool = flag(False, "Compute in bf16, and store that; otherwise float32.")
    device: str | None = flag(None, "torch device. Default: a GPU if there is one.")
    follow_links: bool = flag(False, "Follow lines of a list that lead out of its folder, and links to files.")
    overwrite: bool = flag(False, "Replace files that were made with other settings.")
    max_failures: float = flag(0.01, "Largest share of failed videos with exit code 0.", at_least=0, at_most=1)


@dataclass(frozen=True)
class EvaluateConfig(Checked):
    """Answer a benchmark's questions, and have the answers judged."""

    output: str = field(
        metadata={
            "help": "Folder of predictions, judgements and scores; a run that was killed goes on there.",
            "writes": "folder",
        }
    )
    task: Literal["vcg", "vcg_diverse", "activitynet_qa", "msvd_qa", "msrvtt_qa", "tgif_qa", "mc", "match"] | None = (
        flag(
            None, "The benchmark; mc: any multiple choice (MVBench, Video-MME); match: short answers, compared as text."
        )
    )
    annotations: str | None = flag(None, "The benchmark's own file, or the folder of its files.")
    video: str | None = flag(None, "Folder of its videos, or of their feature files.")
    video_2: str | None = flag(None, "Folder of a second vision tower's feature files: as for chat.")
    compare: str | None = flag(None, "Another --output whose scores are set against these.")
    parity: Literal["reference"] | None = flag(
        None, "reference: also write and score the judge's replies as upstream's scripts do."
    )
    model_name_or_path: str | None = flag(
        None,
        "Folder of the language model and tokenizer. Without it, predictions that are there are judged.",
        group="predictions",
    )
    projector: str | None = flag(None, "Trained projector: as for chat.")
    adapter: str | None = flag(None, "LoRA adapter: as for chat.")
    vision_tower: str | None = flag(None, "Vision tower (hub id or folder): as for chat.")
    vision_tower_2: str | None = flag(None, "Second vision tower: as for chat.")
    conv_mode: Literal["pg-video-llava", "video-chatgpt_v1", "vicuna_v1_1", "chat_template"] | None = flag(
        None, "System text and template of the prompt: as for chat."
    )
    question_order: Literal["reference", "video_first"] | None = flag(
        None, "Where the video stands in the prompt: as for chat."
    )
    mm_use_vid_start_end: bool | None = flag(None, "Default: as the tokenizer or the projector file says.")
    temperature: float = flag(0.0, "0 is greedy; the reference samples at 0.2.", at_least=0, at_most=1000)
    max_new_tokens: int = flag(1024, "Longest answer.", at_least=1)
    num_frames: int | None = flag(None, "Frames per video: as for chat.", at_least=1, at_most=100_000)
    pooling: str | None = flag(None, "What a video's rows are: as for chat.", check=check_spec)
    bf16: bool = flag(False, "Compute in bf16.")
    device: str | None = flag(None, "torch device. Default: a GPU if there is one, under torchrun the rank's own.")
    seed: int = flag(0, "Seed of sampling.", at_least=0, at_most=2**63 - 1)
    at_once: int = flag(32, "Most answers that are continued together.", at_least=1, at_most=4096)
    kv_cache_gib: float | None = flag(
        None,
        "Memory for keys and values. Default: seven tenths of what a GPU has free; 4 GiB on a CPU.",
        above=0,
        at_most=10**6,
    )
    judge: str | None = flag(
        None, "URL of an interface like OpenAI's, such as http://localhost:8000/v1.", group="judgements"
    )
    judge_model: str | None = flag(None, "The judge's name there.")
    judge_key_variable: str = flag(
        "OPENAI_API_KEY", "Environment variable that holds the judge's key, if it wants one."
    )
    judge_at_once: int = flag(8, "Requests that wait for the judge together.", at_least=1, at_most=256)
    judge_timeout: float = flag(60.0, "Seconds after which a reply is given up.", above=0, at_most=10**5)
    judge_retries: int = flag(
        5, "Times that a request is repeated that met 429, 5xx or no connection.", at_least=0, at_most=100
    )
    judge_max_tokens: int = flag(512, "Longest reply; one that is cut off there is no score.", at_least=16)


@dataclass(frozen=True)
class _ServedModel(Checked):
    """The model of `ServeConfig` and `DemoConfig`, and how it answers."""

    model_name_or_path: str = field(metadata={"help": "Folder of the language model and tokenizer."})
    projector: str | None = flag(None, "Trained projector: as for chat.")
    adapter: str | None = flag(None, "LoRA adapter: as for chat.")
    vision_tower: str | None = flag(None, "Vision tower (hub id or folder): as for chat.")
    vision_tower_2: str | None = flag(None, "Second vision tower: as for chat.")
    conv_mode: Literal["pg-video-llava", "video-chatgpt_v1", "vicuna_v1_1", "chat_template"] | None = flag(
        None, "System text and template of the prompt: as for chat."
    )
    question_order: Literal["reference", "video_first"] | None = flag(
        None, "Where the video stands in the prompt: as for chat."
    )
    mm_use_vid_start_end: bool | None = flag(None, "Default: as the tokenizer or the projector file says.")
    temperature: float = flag(0.0, "0 is greedy.", at_least=0, at_most=2)
    max_new_tokens: int = flag(1024, "Longest answer.", at_least=1)
    num_frames: int | None = flag(None, "Frames per video: as for chat.", at_least=1, at_most=100_000)
    pooling: str | None = flag(None, "What a video's rows are: as for chat.", check=check_spec)
    bf16: bool = flag(False, "Compute in bf16.")
    device: str | None = flag(None, "torch device. Default: a GPU if there is one.")


@dataclass(frozen=True)
class ServeConfig(_ServedModel):
    """Answer questions about videos over HTTP, as OpenAI's chat completions."""

    temperature: float = flag(0.0, "Of requests that name none; 0 is greedy.", at_least=0, at_most=2)
    max_new_tokens: int = flag(1024, "Longest answer, whatever a request asks for.", at_least=1)
    host: str = flag("127.0.0.1", "Address to listen at; 0.0.0.0: every network of this machine.", group="server")
    port: int = flag(8000, "Port to listen at; 0: any that is free.", at_least=0, at_most=65535)
    served_model_name: str | None = flag(None, "The model's name in requests. Default: its folder's.")
    api_key: str | None = flag(
        None,
        "Key that requests must bring. Default: FASTVID_API_KEY, which a list of processes does not show; none if "
        "that is not set.",
    )
    allowed_folder: str | None = flag(None, "Folder whose files requests may name by file:// addresses.")
    allow_host: list[str] = flag([], "Hosts (name, or name:port) whose videos requests may name by http(s) addresses.")
    demo: bool = flag(False, "Serve a page to try the model, at the server's address.")
    upstream: str | None = flag(
        None,
        "Address of a vLLM server, such as http://localhost:8001/v1, that answers instead: it gets a video's rows. The "
        "language model is not loaded here.",
    )
    upstream_model: str | None = flag(None, "The model's name there. Default: the only one that it has.")
    upstream_key_variable: str = flag(
        "VLLM_API_KEY", "Environment variable that holds that server's key, if it wants one."
    )
    at_once: int = flag(32, "Most answers that are continued together.", at_least=1, at_most=4096, group="limits")
    max_waiting: int = flag(256, "Requests that may wait beside those; more are refused with 429.", at_least=0)
    kv_cache_gib: float | None = flag(
        None,
        "Memory for keys and values. Default: seven tenths of what a GPU has free; 4 GiB on a CPU.",
        above=0,
        at_most=10**6,
    )
    feature_cache_mib: int = flag(1024, "Memory for features of videos that were asked about.", at_least=0)
    max_body_mib: int = flag(128, "Largest request.", at_least=1, at_most=4096)
    max_video_mib: int = flag(1024, "Largest video of a file:// or http(s) address.", at_least=1)
    max_pixels: int = flag(8192 * 4320, "Most pixels of a picture.", at_least=1)
    max_frames: int = flag(1_000_000, "Most frames of a video, and most pictures of a request.", at_least=1)
    max_seconds: float = flag(4 * 3600.0, "Longest video.", above=0, at_most=10**7)
    decode_timeout: float = flag(
        60.0, "Seconds, beside a video's own length, after which its decoding is given up.", above=0, at_most=10**5
    )
    request_timeout: float = flag(600.0, "Seconds after which a request is given up.", above=0, at_most=10**6)
    grace: float = flag(
        30.0, "Seconds that a server which is told to end gives its answers.", at_least=0, at_most=10**5
    )


@dataclass(frozen=True)
class DemoConfig(_ServedModel):
    """A page of this machine to try a model with clips.

    Others than this machine reach the page of `fastvid serve --demo True`, which has limits and keys.
    """

    port: int = flag(8000, "Port of the page; 0: any that is free.", at_least=0, at_most=65535)
    browser: bool = flag(True, "Open the page in the desktop's browser, where there is a desktop.")


@dataclass(frozen=True)
class ExportConfig(Checked):
    """A checkpoint to the reference's or Hugging Face's format."""

    checkpoint: str = field(metadata={"help": "checkpoint-N folder, or an output_dir (its newest checkpoint)."})
    output: str = field(metadata={"help": "File (projector) or folder (peft, llama, llava) to write."})
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
