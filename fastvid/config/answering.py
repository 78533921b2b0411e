"""What the commands accept that ask a model: chat, embed, evaluate, serve and demo."""

from dataclasses import dataclass, field
from typing import Literal

from fastvid.config.fields import Checked, flag
from fastvid.config.pooling import check_spec

ConvMode = Literal["pg-video-llava", "video-chatgpt_v1", "vicuna_v1_1", "chat_template"]
QuestionOrder = Literal["reference", "video_first"]


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
    conv_mode: ConvMode | None = flag(
        None,
        "System text and template of the prompt. Default: as the weights were trained; where they do not tell "
        "pg-video-llava, as the reference asks, or the model's chat_template.",
    )
    question_order: QuestionOrder | None = flag(
        None,
        "Where the video stands in the prompt; reference: after the question. Default: as the weights were "
        "trained; reference where they do not tell.",
    )
    mm_use_vid_start_end: bool | None = flag(
        None, "Start and end tokens around a video. Default: as the tokenizer or the projector file says."
    )
    temperature: float = flag(0.0, "0 is greedy. The reference samples at 0.2.", at_least=0, at_most=1000)
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
    mm_use_vid_start_end: bool | None = flag(
        None, "Start and end tokens around a video. Default: as the tokenizer or the projector file says."
    )
    num_frames: int | None = flag(None, "Frames per video: as for chat.", at_least=1, at_most=100_000)
    pooling: str | None = flag(None, "What a video's rows are: as for chat.", check=check_spec)
    bf16: bool = flag(False, "Compute in bf16, and store that; otherwise float32.")
    device: str | None = flag(None, "torch device. Default: a GPU if there is one.")
    follow_links: bool = flag(False, "Follow lines of a list, and links, that lead out of the folder.")
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
    follow_links: bool = flag(False, "Follow links in --video that lead out of it.")
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
    conv_mode: ConvMode | None = flag(None, "System text and template of the prompt: as for chat.")
    question_order: QuestionOrder | None = flag(None, "Where the video stands in the prompt: as for chat.")
    mm_use_vid_start_end: bool | None = flag(
        None, "Start and end tokens around a video. Default: as the tokenizer or the projector file says."
    )
    temperature: float = flag(0.0, "0 is greedy. The reference samples at 0.2.", at_least=0, at_most=1000)
    max_new_tokens: int | None = flag(
        None,
        "Longest answer. Default: 1024 tokens; of mc and match 128, as --eval_max_new_tokens of train.",
        at_least=1,
    )
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
    conv_mode: ConvMode | None = flag(None, "System text and template of the prompt: as for chat.")
    question_order: QuestionOrder | None = flag(None, "Where the video stands in the prompt: as for chat.")
    mm_use_vid_start_end: bool | None = flag(
        None, "Start and end tokens around a video. Default: as the tokenizer or the projector file says."
    )
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
