"""``fastvid chat``: questions about videos, asked as the reference's inference asks them.

Dimensions: R rows of a video (temporal + spatial), C channels of the vision tower.
"""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastvid.batch import Features
from fastvid.config import ChatConfig
from fastvid.files import is_url, shown
from fastvid.flags import parse
from fastvid.inference.chat import MEDIA_SUFFIXES, Chat
from fastvid.inference.questions import Question, list_media, read_questions
from fastvid.video.encoder import make_current, open_device
from fastvid.video.listing import no_video


def answer_all(chat: Chat, questions: Sequence[Question], known: Mapping[Path, Features], *, as_json: bool) -> bool:
    """Print what is answered to each question on stdout, in order, with progress on stderr.

    A video's features are made once, whatever the number of its questions. What cannot be answered costs one line on
    stderr: one for a bad video, or one for a question.

    Args:
        questions: list of Question. One with a `fault` has no file to look at.
        known: {path: features} of files that were looked at before.
        as_json: print a JSON line for each (`Question.line`), with "error" where there is no answer; otherwise the
            answer below its question.

    Returns:
        whether all were answered.
    """
    from tqdm import tqdm

    left, complete = Counter(question.path for question in questions), True
    looked_at: dict[Path | None, Features | Exception] = {**known}

    def features_of(question):
        """The features, or why there are none."""
        if question.path not in looked_at:
            try:
                looked_at[question.path] = chat.features(question.path)
            except (ValueError, OSError) as error:
                looked_at[question.path] = error
                complain(error)
        features = looked_at[question.path]
        left[question.path] -= 1
        if not left[question.path]:
            del looked_at[question.path]
        return features

    def complain(error):
        nonlocal complete
        complete = False
        tqdm.write(f"fastvid chat: error: {error}", file=sys.stderr)

    hidden = len(questions) < 2 or not sys.stderr.isatty()
    for question in tqdm(questions, desc="chat", unit=" questions", disable=hidden, file=sys.stderr):
        answers, fault = [], question.fault
        if fault is not None:
            complain(fault)
        elif isinstance(features := features_of(question), Exception):
            fault = features
        else:
            try:
                answers = [chat.ask_features(features, text) for text in question.texts]
            except ValueError as error:
                fault = f"{question.path}: {error}"
                complain(fault)
        if as_json and (fault is None or question.record is not None):
            tqdm.write(json.dumps(question.line(answers, fault), ensure_ascii=False), file=sys.stdout)
        elif fault is None:
            tqdm.write(f"{question.texts[0]}\n{answers[0]}\n", file=sys.stdout)
        sys.stdout.flush()
    return complete


def converse(chat: Chat, video: Path) -> None:
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 1 if something could not be answered."""
    config = parse(ChatConfig, argv)
    if not config.video:
        raise ValueError("give --video: a video, a feature file, or a folder of them")
    if is_url(config.video):
        raise ValueError(f"--video {shown(config.video)} is a URL: download the video and give its path")
    path = Path(config.video)
    if not path.exists():
        raise ValueError(f"--video {path} does not exist")
    if not path.is_dir() and (fault := no_video(path)):
        raise ValueError(f"--video {path} {fault}")
    if config.question and config.questions_file:
        raise ValueError("give --question or --questions_file, not both")
    if any(not question.strip() for question in config.question):
        raise ValueError("--question is empty; give one (an unset shell variable is empty too)")
    typed = not config.question and config.questions_file is None
    if typed and (path.is_dir() or not sys.stdin.isatty()):
        raise ValueError("give --question or --questions_file (questions are typed at a terminal, about one video)")

    files = list_media(path, MEDIA_SUFFIXES)
    if config.questions_file is not None:
        questions = read_questions(config.questions_file, files, MEDIA_SUFFIXES, path if path.is_dir() else None)
        if all(question.fault for question in questions):
            raise ValueError(f"none of the {len(questions)} questions can be asked; the first: {questions[0].fault}")
    else:
        questions = [Question(name, file, (text,)) for name, file in files.items() for text in config.question]
    make_current(open_device(config.device))
    chat = Chat(config)
    try:
        if typed:
            converse(chat, path)
            return 0
        known = {} if path.is_dir() else {path: chat.features(path)}
        if known and len(config.question) == 1:
            print(chat.ask_features(known[path], config.question[0]))
            return 0
        as_json = path.is_dir() or config.questions_file is not None
        return 0 if answer_all(chat, questions, known, as_json=as_json) else 1
    finally:
        chat.close()


if __name__ == "__main__":
    from fastvid.cli import run

    run("chat")
