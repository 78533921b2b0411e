"""From predictions and judgements to scores, each with an interval that knows which questions share a video.

Dimensions: V videos, T resamples.
"""

import ast
import json
import re
import string
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fastvid.evaluation.grading import Ask
from fastvid.evaluation.lines import read_lines
from fastvid.evaluation.options import LETTERS
from fastvid.files import StrPath, atomic_file, read_json_object, shown
from fastvid.provenance import same_tower

SCORES, VALUES = "scores.json", "values.json"
_RESAMPLES = 2000
_MOST_DRAWN = 1 << 20  # numbers of resamples that lie in memory together
# What two sets of scores must have in common.
_OF_QUESTIONS, _OF_JUDGE = ("task", "annotations", "samples"), ("judge", "prompts")
# How answers name a letter, the plainest first: "(B)"; "B", "B." or "B: …"; "the answer is B".
_LETTERED = (
    re.compile(r"\(([A-Z])\)"),
    re.compile(r"^\s*([A-Z])(?=[).:,]|\s*$)"),
    re.compile(
        r"\b(?:[Aa]nswer|[Oo]ption)(?: is)?:?\s+([A-Z])\b(?!(?<=A)\s+(?!because|since|as\b)[a-z])"
    ),  # no "A dog"
)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_OF_NUMBERS = re.compile(r"(?<!\w)-(?=\.?\d)|(?<=\d)\.(?=\d)")  # -5 is not 5, and 3.5 is not 35


def interval(
    values: Iterable[float], videos: Iterable[Hashable]
) -> tuple[float, float, float] | tuple[float, None, None]:
    """(mean, low, high) of values, with the 95 % interval of a bootstrap that draws whole videos (seeded).

    A single video tells nothing of others: there is no interval.

    Args:
        values: numbers, at least one.
        videos: of each value, its video's name.
    """
    sums, counts = defaultdict(float), Counter()
    for value, video in zip(values, videos, strict=True):
        sums[video] += value
        counts[video] += 1
    names = sorted(counts)
    sums_V, counts_V = (np.array([of[name] for name in names], dtype=float) for of in (sums, counts))
    mean = float(sums_V.sum() / counts_V.sum())
    if len(names) == 1:
        return mean, None, None
    draws, means = np.random.default_rng(0), []
    at_once = max(1, _MOST_DRAWN // len(names))
    for done in range(0, _RESAMPLES, at_once):
        size = min(at_once, _RESAMPLES - done)
        drawn_TV = draws.multinomial(len(names), [1 / len(names)] * len(names), size=size)
        means.append((drawn_TV @ sums_V) / (drawn_TV @ counts_V))
    means_T = np.concatenate(means)
    low, high = np.percentile(means_T, [2.5, 97.5])
    return mean, float(low), float(high)


def choice_values(lines: Iterable[dict]) -> dict[str, dict]:
    """Of multiple choices: whether the likeliest option is right, by its whole text and by its mean token; and whether
    the letter that the answer names is. {figure: {id: (1 or 0, video)}}

    An option with the text of the right one is right as well: nothing tells the two apart."""
    figures = defaultdict(dict)
    for line in lines:
        logs = [value for value, _ in line["likelihoods"]]
        per_token = [value / tokens for value, tokens in line["likelihoods"]]
        letter, texts = read_letter(line["prediction"], line["options"]), [text.strip() for text in line["options"]]
        chosen = {"likelihood": _best(logs), "likelihood_per_token": _best(per_token), "letter": letter}
        for figure, option in chosen.items():
            right = float(option is not None and texts[option] == texts[line["right"]])
            for name in (figure, f"{figure}/{line['group']}") if line["group"] else (figure,):
                figures[name][line["id"]] = (right, line["video"])
    return dict(figures)


def values_without_judge(task: str, lines: Iterable[dict]) -> dict[str, dict] | None:
    """{figure: {id: (value, video)}} of a task's predictions, which a rule scores; None of a task for a judge."""
    rule = {"mc": choice_values, "match": match_values}.get(task)
    return None if rule is None else rule(lines)


def _best(values):
    return max(range(len(values)), key=values.__getitem__)


def read_letter(text: str, options: Sequence[str]) -> int | None:
    """The option that an answer names by its letter, or else by its whole text; None if it names none or several."""
    for pattern in _LETTERED:
        named = {letter for letter in pattern.findall(text) if letter in LETTERS[: len(options)]}
        if named:
            return LETTERS.index(named.pop()) if len(named) == 1 else None
    same = [number for number, option in enumerate(options) if _plain(option) == _plain(text)]
    return same[0] if len({options[number].strip() for number in same}) == 1 else None


def match_values(lines: Iterable[dict]) -> dict[str, dict]:
    """Of short answers: exact match and F1 of the words, both without case, articles and punctuation."""
    figures = defaultdict(dict)
    for line in lines:
        found, right = _plain(line["prediction"]), _plain(line["answer"])
        for figure, value in (("exact", float(found == right)), ("f1", word_f1(found, right))):
            for name in (figure, f"{figure}/{line['group']}") if line["group"] else (figure,):
                figures[name][line["id"]] = (value, line["video"])
    return dict(figures)


def _plain(text):
    """Of a text that is nothing else, articles or punctuation stay."""
    text = unicodedata.normalize("NFKC", text).casefold()
    kept = {found.start() for found in _OF_NUMBERS.finditer(text)}
    letters = "".join(c for at, c in enumerate(text) if at in kept or not _is_punctuation(c))
    return " ".join(_ARTICLES.sub(" ", letters).split() or letters.split() or text.split())


def _is_punctuation(letter):
    return letter in string.punctuation or unicodedata.category(letter)[0] == "P"


def word_f1(found: str, right: str) -> float:
    """Harmonic mean of the shares of words that two texts have in common."""
    words, others = found.split(), right.split()
    common = (Counter(words) & Counter(others)).total()
    return 2 * common / (len(words) + len(others)) if common else float(words == others)


def judged_values(
    lines: list[dict], wanted: list[Ask], judgements: list[dict]
) -> tuple[dict[str, dict], Counter, Counter]:
    """Of judged predictions: ({figure: {id: (value, video)}}, replies that cannot be read, and those that are not
    there, both by aspect).

    Args:
        lines: of the predictions.
        wanted: `fastvid.evaluation.grading.asks` of them.
        judgements: lines of the replies.
    """
    of, by_key = {line["id"]: line for line in lines}, replies_by_key(judgements)
    figures, unreadable, unanswered = defaultdict(dict), Counter(), Counter()
    groups = defaultdict(dict)  # of a group: its samples' mean over correctness and detail
    for ask in wanted:
        line, judgement = of[ask.id], by_key.get(ask.key)
        if judgement is None:
            unanswered[ask.aspect] += 1
        elif "score" not in judgement:
            unreadable[ask.aspect] += 1
        else:
            score = float(judgement["score"])
            figures["score" if ask.aspect == "qa" else ask.aspect][ask.id] = (score, line["video"])
            if ask.aspect == "qa":
                figures["accuracy"][ask.id] = (float(judgement["pred"] == "yes"), line["video"])
            if line["group"] and ask.aspect in ("correctness", "detail"):
                groups[line["group"]].setdefault(ask.id, []).append(score)
    for group, of_ids in groups.items():
        figures[f"correctness and detail/{group}"] = {
            name: (sum(scores) / 2, of[name]["video"]) for name, scores in of_ids.items() if len(scores) == 2
        }
    return dict(figures), unreadable, unanswered


def replies_by_key(judgements: Iterable[dict]) -> dict[str, dict]:
    """{key: judgement}; of several the first that was not cut off, else the last."""
    found = {}
    for judgement in judgements:
        if "cut" in found.setdefault(judgement["key"], judgement):  # a longer reply was asked for since
            found[judgement["key"]] = judgement
    return found


def upstream_entries(lines: list[dict], wanted: list[Ask], judgements: list[dict]) -> dict[str, dict]:
    """{aspect: {key: [reply, {question, answer, prediction}]}}: what upstream's scoring scripts combine, with their
    keys, of the replies that they can read.

    Those keys are the video's name and how many of its samples come before in the benchmark, where ids ascend.
    """
    of, by_key, counts = {line["id"]: line for line in lines}, replies_by_key(judgements), Counter()
    combined = defaultdict(dict)
    for ask in sorted(wanted, key=lambda ask: _natural(ask.id)):
        line, judgement = of[ask.id], by_key.get(ask.key)
        number = counts[ask.aspect, line["video"]]
        counts[ask.aspect, line["video"]] += 1
        if judgement is None or "cut" in judgement:
            continue
        try:
            reply = ast.literal_eval(judgement["reply"])
            json.dumps(reply)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue  # upstream asks again until it can be read, and writes it
        if not isinstance(reply, dict):
            continue
        if isinstance(line["question"], list):
            values = [*line["question"], line["answer"], *line["prediction"]]
            pair = dict(zip(("q1", "q2", "a", "pred1", "pred2"), values))
        else:
            pair = {"q": line["question"], "a": line["answer"], "pred": line["prediction"]}
        combined[ask.aspect][f"{line['video']}_{number}"] = [reply, pair]
    return dict(combined)


def _natural(name):
    """A key by which "x/2" is sorted before "x/10"."""
    return [int(piece) if number % 2 else piece for number, piece in enumerate(re.split(r"([0-9]{1,18})", name))]


def upstream_figures(combined: dict) -> dict[str, float]:
    """What upstream's scripts compute of a combined file {key: [reply, pair]}: the mean of int(score), in which what
    has no score counts as 0; and for replies with a "pred" the share of "yes" among "yes" and "no".

    Source: quantitative_evaluation/evaluate_benchmark_1_correctness.py and evaluate_activitynet_qa.py of
    Video-ChatGPT.
    """
    total, yes, no = 0, 0, 0
    for reply, *_ in combined.values():
        try:
            total += float(int(reply["score"]))
            said = str(reply.get("pred", "")).lower()
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
            continue
        yes, no = yes + ("yes" in said), no + ("yes" not in said and "no" in said)
    figures = {"average_score": total / len(combined)} if combined else {}
    return figures | ({"accuracy": yes / (yes + no)} if yes + no else {})


def write_scores(output: StrPath, about: dict, figures: dict[str, dict], more: dict) -> dict:
    """Write ``scores.json`` and, for comparisons, every sample's values to ``values.json``.

    Args:
        about: what the scores are of.
        figures: {figure: {id: (value, video)}}.
        more: what else is told of the figures.

    Returns:
        what scores.json holds.
    """
    told = {}
    for name, values in sorted(figures.items()):
        mean, low, high = interval(*zip(*values.values()))
        told[name] = {"mean": mean, "low": low, "high": high, "n": len(values)}
    scores = {**about, **more, "scores": told}
    # A kill between the two must not leave values of one judge beside the name of another.
    (Path(output) / SCORES).unlink(missing_ok=True)
    for file, content in ((VALUES, figures), (SCORES, scores)):
        with atomic_file(Path(output) / file) as out:
            out.write(json.dumps(content, indent=1 if file == SCORES else None).encode() + b"\n")
    return scores


def table(scores: dict) -> str:
    """Scores for a terminal."""
    rows = [
        f"{name:<32} {each['mean']:8.4f}   {_shown(each['low'], each['high'])}   {each['n']:,}"
        for name, each in scores["scores"].items()
    ]
    return "\n".join([f"{'score':<32} {'mean':>8}   95 % interval      samples", *rows])


def _shown(low, high, sign=""):
    """An interval, for a table."""
    return "one video: none " if low is None else f"[{low:{sign}.4f}, {high:{sign}.4f}]"


def check_comparable(about: Mapping, output: StrPath, other: StrPath) -> None:
    """Refuse to compare scores of other questions, another judge or other prompts; nothing need be scored here yet.

    Args:
        about: of the scores of `output`; what it lacks is not known yet.
        other: folder, which has scores.

    Raises:
        ValueError: with the remedy.
    """
    there = read_scores(other)
    for names, remedy in (
        (_OF_QUESTIONS, "give --compare a folder with predictions for the same annotations"),
        (_OF_JUDGE, "judge both folders' predictions by one judge, with one version of fastvid"),
    ):
        differing = [
            f"{name}: {shown(about[name])} and {shown(there.get(name))}"
            for name in names
            if name in about and about[name] != there.get(name)
        ]
        if differing:
            raise ValueError(
                f"scores of {shown(output)} and {shown(other)} cannot be compared ({'; '.join(differing)}); {remedy}"
            )


def compare(output: StrPath, other: StrPath) -> str:
    """How much the scores of one folder are above those of another, for a terminal; of the samples that both have.

    Raises:
        ValueError: scores that cannot be compared: of other questions, another judge or other prompts.
    """
    one, two = (read_scores(folder) for folder in (output, other))
    check_comparable({name: one.get(name) for name in _OF_QUESTIONS + _OF_JUDGE}, output, other)
    rows = [f"{'score':<32} {'here':>8} {'there':>8} {'more':>8}   95 % interval      samples"]
    values, others = (_read(folder, VALUES) for folder in (output, other))
    for name in sorted(values.keys() & others.keys()):
        ids = [each for each in values[name] if each in others[name]]
        if ids:
            here, there = ([of[name][each][0] for each in ids] for of in (values, others))
            more, low, high = interval([a - b for a, b in zip(here, there)], [values[name][each][1] for each in ids])
            means = f"{sum(here) / len(ids):8.4f} {sum(there) / len(ids):8.4f} {more:+8.4f}"
            rows.append(f"{name:<32} {means}   {_shown(low, high, '+')}   {len(ids):,}")
    towers = [_towers(of, folder) for of, folder in ((one, output), (two, other))]
    if _other_towers(*towers, whole=bool(one.get("tower") and two.get("tower"))):
        rows.append(f"the models see by other vision towers: {towers[0]} and {towers[1]}")
    elif bool(towers[0]) != bool(towers[1]):
        rows.append(f"the vision tower is known of one side alone: {towers[0] or towers[1]}")
    urls = [addresses(of.get("judge_url")) for of in (one, two)]
    if all(urls) and urls[0] != urls[1]:
        rows.append(
            f"WARNING: {one['judge']} was asked at {' and '.join(urls[0])} here, and at {' and '.join(urls[1])} there. "
            "If those are two models of one name, these differences are the judges' as well: the name alone tells "
            "judges apart"
        )
    return "\n".join(rows)


def addresses(told: str | list[str] | None) -> list[str]:
    """Those of a judge, as scores tell them: one, or several in a list."""
    return [told] if isinstance(told, str) else list(told or ())


def _towers(scores, folder):
    """The vision towers that a folder's predictions are of: as the weights tell, or else the features; [] unknown."""
    told = scores.get("tower")
    if told is None:
        told = next((line["tower"] for line in read_lines(folder, "predictions") if line.get("tower")), None)
    return [told] if isinstance(told, str) else list(told or ())


def _other_towers(here, there, *, whole):
    """Whether two lists of vision towers are known to differ; `whole`: of neither the second one is left out."""
    pairs = [pair for pair in zip(here, there) if all(pair)]
    return any(same_tower(one, [two]) is False for one, two in pairs) or (whole and len(here) != len(there))


def read_scores(folder: StrPath) -> dict:
    """What a folder's scores.json holds.

    Raises:
        ValueError: there is none.
    """
    return _read(folder, SCORES)


def _read(folder, name):
    found = read_json_object(Path(folder) / name)
    if not found:
        raise ValueError(f"{shown(folder)} holds no scores: score its predictions first (fastvid evaluate --output …)")
    return found
