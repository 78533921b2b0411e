"""``fastvid chat``: questions about videos, asked as the reference's inference asks them.

Dimensions: R rows of a video (temporal + spatial), C channels of the vision tower.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch

from fastvid import checkpoint
from fastvid.config import ChatConfig
from fastvid.data.batching import pack
from fastvid.data.conversation import EncodedSample, inference_prompt, load_tokenizer
from fastvid.data.features import SUFFIXES, load_features
from fastvid.data.questions import Question, list_media, read_questions
from fastvid.data.video_tokens import read_settings
from fastvid.flags import parse
from fastvid.model.attention_check import settle_attention
from fastvid.model.generate import generate
from fastvid.model.video_llava import VideoLlava
from fastvid.model.weights import StartingWeights, load_weights, read_model_config, read_projector
from fastvid.video.decode.worker import DecodeWorker
from fastvid.video.encoder import FeatureEncoder, make_current, open_device
from fastvid.video.listing import VIDEO_SUFFIXES

MEDIA_SUFFIXES = (*SUFFIXES, *sorted(VIDEO_SUFFIXES))  # in the order in which one of several files is taken
_PROJECTOR_FILES = ("mm_projector.bin", "mm_projector.safetensors")


class Chat:
    """A loaded model that answers questions about videos.

    Args:
        config: ChatConfig; or its fields by name: ``Chat(model_name_or_path=…, projector=…)``.

    Raises:
        ValueError: a folder, file or tensor that cannot be used, with the remedy.
    """

    def __init__(self, config=None, **settings):
        self.config = config = config or ChatConfig(**settings)
        self.device = open_device(config.device)
        projector = None if config.projector is None else _projector_path(Path(config.projector))
        run = {} if config.projector is None else _training_config(Path(config.projector))
        self.tokenizer = load_tokenizer(config.model_name_or_path, _use_start_end(config, run, projector))
        tokens, seed = self.tokenizer.tokens, run.get("seed", 42)
        self.model_config = read_model_config(
            config.model_name_or_path, vocab_size=tokens.vocab_size, projector=projector)
        starting = StartingWeights(
            self.model_config, config.model_name_or_path, tokens=tokens, projector=projector, seed=seed)
        if starting.makes_projector:
            raise ValueError(f"{config.model_name_or_path} holds no projector: give the trained one with --projector")
        sizes, dtype = self.model_config.decoder, torch.bfloat16 if config.bf16 else torch.float32
        attention = settle_attention("auto", self.device, dtype, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim)
        with torch.device("meta"):
            self.model = VideoLlava(self.model_config, trainable=frozenset(), compute_dtype=dtype,
                                    attn_implementation=attention)
        self.model.to_empty(device=self.device)
        load_weights(self.model, config.model_name_or_path, tokens=tokens, projector=projector, seed=seed)
        self._encoder = None
        self._worker = DecodeWorker()

    def ask(self, video, question, history=()):
        """The answer to a question about a video.

        Args:
            video: path of a video, or of a feature file (.safetensors, .pkl).
            question: text.
            history: (question, answer) turns that came before.

        Raises:
            ValueError: the video cannot be decoded, its features do not fit the model, or the prompt is too long.
            OSError: the file cannot be read.
        """
        return self.ask_features(self.features(video), question, history)

    def ask_features(self, features_RC, question, history=()):
        """`ask` about the [R, C] features of a video."""
        channels = self.model_config.mm_hidden_size
        if features_RC.dim() != 2 or features_RC.shape[1] != channels:
            raise ValueError(f"features are {list(features_RC.shape)}, the projector takes [rows, {channels}]: they "
                             "were made with another vision tower")
        tokens = self.tokenizer.tokens
        ids = inference_prompt(
            question, self.tokenizer, video_tokens=len(features_RC), use_start_end=tokens.start is not None,
            conv_mode=self.config.conv_mode, history=history, question_order=self.config.question_order)
        batch = pack([(EncodedSample("question", ids), [features_RC])], tokens, channels)
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        answer = generate(
            self.model, batch.to(self.device), max_new_tokens=self.config.max_new_tokens, eos=self.tokenizer.eos,
            temperature=self.config.temperature, generator=generator)
        return self.tokenizer.decode(answer).strip()

    def features(self, video):
        """[R, C] features of a video, or those that lie in a feature file."""
        if Path(video).suffix in SUFFIXES:
            return load_features(video)[0]
        encoder = self._loaded_encoder()
        frames, _ = self._worker.decode(
            str(video), num_frames=self.config.num_frames, size=encoder.image_size)
        return encoder.encode(frames)

    def close(self):
        """End the process that decodes."""
        self._worker.close()

    def _loaded_encoder(self):
        if self._encoder is None:
            tower = self.config.vision_tower or self.model_config.vision_tower
            if tower is None:
                raise ValueError(f"{self.config.model_name_or_path} names no vision tower: give --vision_tower")
            encoder = FeatureEncoder(tower, device=self.device, num_temporal=self.config.num_frames)
            if encoder.hidden_size != self.model_config.mm_hidden_size:
                raise ValueError(f"--vision_tower {tower} has {encoder.hidden_size} channels, the projector takes "
                                 f"{self.model_config.mm_hidden_size}: give the tower that made the features")
            self._encoder = encoder
        return self._encoder


def _projector_path(path):
    """The file or checkpoint folder that ``--projector`` means; of an --output_dir what training left at its end."""
    if path.is_file() or (path / "checksums.json").is_file():
        return path
    for name in _PROJECTOR_FILES:
        if (path / name).is_file():
            return path / name
    found = checkpoint.newest_valid(path) if path.is_dir() else None
    if found is None:
        raise ValueError(f"--projector {path}: neither a projector file (.bin, .safetensors) nor a checkpoint-N folder "
                         "or an --output_dir that holds one")
    return found


def _training_config(path):
    """The flags of the run that left `path`, as far as a checkpoint tells."""
    if not path.is_dir():
        return {}
    folder = path if (path / "checksums.json").is_file() else checkpoint.newest_valid(path)
    return {} if folder is None else checkpoint.read_state(folder).get("config", {})


def _use_start_end(config, run, projector):
    """Whether prompts have <vid_start> and <vid_end>: as told, else as the run had it, else where they have rows."""
    told = (config.mm_use_vid_start_end, run.get("mm_use_vid_start_end"),
            read_settings(config.model_name_or_path).get("mm_use_vid_start_end"))
    for value in told:
        if value is not None:
            return value
    tokens = load_tokenizer(config.model_name_or_path, None).tokens
    if tokens.start is not None or projector is None:
        return tokens.start is not None
    try:
        with_both = load_tokenizer(config.model_name_or_path, True).tokens
        return "boundary.weight" in read_projector(projector, with_both)
    except ValueError as error:
        raise ValueError(f"{error}. If it was trained without them: --mm_use_vid_start_end False") from error


def answer_all(chat, questions, *, as_json):
    """Print an answer to each question on stdout, in order, with progress on stderr.

    A video's features are made once, whatever the number of its questions. What cannot be answered costs one line on
    stderr: one for a bad video, or one for a question.

    Args:
        as_json: print {"video", "question", "answer"}; otherwise the answer alone, below its question if there are
            several.

    Returns:
        whether all were answered.
    """
    from tqdm import tqdm

    left, known, complete = Counter(question.path for question in questions), {}, True

    def complain(error):
        nonlocal complete
        complete = False
        tqdm.write(f"fastvid chat: error: {error}", file=sys.stderr)

    hidden = len(questions) < 2 or not sys.stderr.isatty()
    for question in tqdm(questions, desc="chat", unit=" questions", disable=hidden, file=sys.stderr):
        if question.path not in known:
            try:
                known[question.path] = chat.features(question.path)
            except (ValueError, OSError) as error:
                known[question.path] = None
                complain(error)
        features = known[question.path]
        left[question.path] -= 1
        if not left[question.path]:
            known[question.path] = None
        if features is None:
            continue
        try:
            answer = chat.ask_features(features, question.text)
        except ValueError as error:
            complain(f"{question.path}: {error}")
            continue
        if as_json:
            line = json.dumps({"video": question.video, "question": question.text, "answer": answer},
                              ensure_ascii=False)
        else:
            line = answer if len(questions) == 1 else f"{question.text}\n{answer}\n"
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
    return complete


def converse(chat, video):
    """Questions typed about one video, each with the turns before it; an empty line or Ctrl-D ends it."""
    import readline  # noqa: F401  gives input() a line editor and its history

    features, history = chat.features(video), []
    print(f"Ask about {video}; an empty line ends.", file=sys.stderr)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        try:
            answer = chat.ask_features(features, question, history)
        except ValueError as error:
            print(f"fastvid chat: error: {error}", file=sys.stderr)
            continue
        print(answer)
        history.append((question, answer))


def main(argv=None):
    """The command line; returns the exit code: 1 if something could not be answered."""
    config = parse(ChatConfig, argv)
    if config.video is None:
        raise ValueError("give --video: a video, a feature file, or a folder of them")
    path = Path(config.video)
    if not path.exists():
        raise ValueError(f"--video {path} does not exist")
    if config.question and config.questions_file:
        raise ValueError("give --question or --questions_file, not both")
    typed = not config.question and config.questions_file is None
    if typed and (path.is_dir() or not sys.stdin.isatty()):
        raise ValueError("give --question or --questions_file (questions are typed at a terminal, about one video)")

    files, faults = list_media(path, MEDIA_SUFFIXES), []
    if config.questions_file is not None:
        folder = path if path.is_dir() else None
        questions, faults = read_questions(config.questions_file, files, MEDIA_SUFFIXES, folder)
    else:
        questions = [Question(name, file, text) for name, file in files.items() for text in config.question]
    for fault in faults:
        print(f"fastvid chat: error: {fault}", file=sys.stderr)
    make_current(open_device(config.device))
    chat = Chat(config)
    try:
        if typed:
            converse(chat, path)
            return 0
        as_json = path.is_dir() or config.questions_file is not None
        return 0 if answer_all(chat, questions, as_json=as_json) and not faults else 1
    finally:
        chat.close()


if __name__ == "__main__":
    from fastvid.cli import run

    run("chat")
